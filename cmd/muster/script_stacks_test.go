package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// slotimage: slotimage DIR VERSION KEY writes a small slot image with its
// manifest, signed by the key.
func scriptSlotImage(ts *testscript.TestScript, neg bool, args []string) {
	dir, version := ts.MkAbs(args[0]), args[1]
	signer, err := readReleaseKey(ts.MkAbs(args[2]))
	ts.Check(err)
	ts.Check(os.MkdirAll(dir, 0o755))
	file := func(kind string, size int) firmware.File {
		b := bytes.Repeat([]byte(version+kind), size)[:size]
		name := "system-" + version + "-amd64." + kind
		ts.Check(os.WriteFile(filepath.Join(dir, name), b, 0o644))
		return firmware.File{File: name, Size: int64(size), SHA256: sha256.Sum256(b)}
	}
	uki, root, verity, loader := file("efi", 5000), file("root", 3*4096), file("verity", 4096), file("loader.efi", 900)
	b, err := os.ReadFile(filepath.Join(dir, root.File))
	ts.Check(err)
	chunks, err := firmware.Chunks(bytes.NewReader(b))
	ts.Check(err)
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: uki.SHA256}}
	pcr11, err := firmware.PCR11(sections)
	ts.Check(err)
	m := firmware.Manifest{
		Format: firmware.ManifestFormat, Name: "system", Version: version, Kind: fleet.ImageSlot, Arch: "amd64", File: uki.File, SHA256: uki.SHA256, Size: uki.Size,
		Created: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), Parts: []firmware.Part{{Name: "kernel", Size: 1}},
		Measurements: firmware.Measurements{Authenticode: uki.SHA256, Kernel: root.SHA256, PCR11: pcr11, Sections: sections, Loader: loader.SHA256},
		Slot: &firmware.SlotImage{
			Root: root, Verity: verity, Loader: loader, RootHash: root.SHA256, ChunkSize: firmware.ChunkSize, Chunks: chunks,
			RootUUID: "00000000-0000-4000-8000-000000000001", VerityUUID: "00000000-0000-4000-8000-000000000002",
			K3s: "v1.36.3+k3s1", K3sDigest: root.SHA256, EtcdMinor: "3.6",
		},
	}
	payload, err := m.JSON()
	ts.Check(err)
	env, err := statement.Sign(firmware.ManifestType, payload, signer)
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(dir, "system-"+version+"-amd64.manifest"), env.JSON(), 0o644))
}

// system: system DIR NAME VERSION STATE is what a node would say of its
// system: it runs the stack version, or fails to.
func scriptSystem(ts *testscript.TestScript, neg bool, args []string) {
	inStore(ts, args[0], func(t store.Tx) error {
		n, err := t.Node("default", fleet.NodeID(ts.Getenv("NODE_"+args[1])))
		if err != nil {
			return err
		}
		v, err := t.StackVersion("default", "shop", args[2])
		if err != nil {
			return err
		}
		n.LastSeen = time.Now()
		n.Hardware.Disks = []fleet.Disk{
			{Path: "/dev/sda", Model: "M", Serial: "S1", WWN: "naa.1", SizeBytes: 1 << 36},
			{Path: "/dev/sdb", Model: "M", Serial: "S1", WWN: "naa.2", SizeBytes: 1 << 36},
		}
		if _, err := t.PutNode(n); err != nil {
			return err
		}
		r := fleet.SystemReport{
			Tenant: "default", Site: n.Site, Node: n.ID, At: time.Now(), Slot: fleet.SlotA, Image: "system@" + args[2],
			Stack: &fleet.StackRef{Name: "shop", Version: args[2], SHA256: v.SHA256},
		}
		if err := r.State.UnmarshalText([]byte(args[3])); err != nil {
			return err
		}
		if r.State == fleet.SystemFailed {
			r.Reason = "the disk is full"
		}
		return errors.Join(t.PutSystem(r), t.TouchNode("default", n.ID, time.Now()))
	})
}
