package install

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/image"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/lab/machine"
)

// vmTime bounds one start of the machine, without hardware virtualization.
const vmTime = 6 * time.Minute

// TestInstallInVM installs onto a disk of a virtual machine with the real
// kernel, its vfat and the firmware's own variables: the machine then starts
// the loader from that disk, and the loader starts the boot file and counts.
// In between the power is cut; a disk that the order does not name stays as it
// was.
func TestInstallInVM(t *testing.T) {
	if os.Getenv("MUSTER_VM_TESTS") == "" {
		t.Skip("starts a virtual machine: set MUSTER_VM_TESTS=1 to run it")
	}
	const loader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
	boot, err := os.ReadFile(loader)
	if err != nil {
		t.Skipf("no boot loader to install (package systemd-boot-efi): %v", err)
	}
	dir := t.TempDir()
	init := filepath.Join(dir, "vminit")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", init, "./testdata/vminit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := image.Build(t.Context(), image.RecoveryConfig{OutDir: filepath.Join(dir, "image"), Version: "1.0", Flavour: image.FlavourCloud, NodeBinary: init,
		CacheDir: filepath.Join(cache, "muster", "debs"), Release: key,
		Site: fleet.SiteConfig{Centre: []string{"https://centre.example:7444"}, RootsPEM: anyRoot(t)}}); err != nil {
		t.Skipf("no image can be built here: %v", err)
	}
	uki, err := os.ReadFile(filepath.Join(dir, "image", image.RecoveryFile))
	if err != nil {
		t.Fatal(err)
	}
	manifest := blobsDisk(t, filepath.Join(dir, "blobs.img"), key, uki, boot)
	target, other := filepath.Join(dir, "target.img"), filepath.Join(dir, "other.img")
	for _, name := range []string{target, other} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(bytes.Repeat([]byte("foreign "), 4096), 0)
		if err = errors.Join(err, f.Truncate(firmware.MinDisk), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	folder := filepath.Join(dir, "esp")
	if err := machine.BootFolder(folder, filepath.Join(dir, "image", image.RecoveryFile)); err != nil {
		t.Fatal(err)
	}
	m, err := machine.New(machine.Config{Name: "vm", Dir: filepath.Join(dir, "m"), NoTPM: true, Boot: machine.BootDisk, FirmwareOrder: true,
		Disks:  []machine.Disk{{File: target, Serial: "TARGET"}, {File: other, Serial: "OTHER"}, {File: filepath.Join(dir, "blobs.img"), Serial: "BLOBS"}, {Folder: folder, Boot: true}},
		OnLine: func(l machine.Line) { t.Logf("%s %s", l.At.Format("04:05"), l.Text) }})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	wait := func(from int, pattern string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), vmTime)
		defer cancel()
		l, err := m.Serial().Wait(ctx, from, regexp.MustCompile(pattern+`|vminit: FAILED|Kernel panic`))
		if err != nil || !regexp.MustCompile(pattern).MatchString(l.Text) {
			t.Fatalf("waiting for %q: %q, %v", pattern, l.Text, err)
		}
	}
	// Three cuts of the power: while the slot is written, while the boot file
	// comes, and while the loader does.
	for _, at := range []string{`vminit: writing [2468]0 %`, `vminit: files 100 %: The boot file comes`, `The boot loader comes`} {
		if err := m.PowerOn(t.Context()); err != nil {
			t.Fatal(err)
		}
		wait(m.Serial().Mark(), at)
		if err := m.Cut(); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	wait(0, `vminit: RESTART: I start edge 1`)
	// The machine starts again by itself, from its disk.
	wait(0, `vminit: STARTED by the loader: edge-1\+\d.* counts in EFI/Linux/edge-1\+2-1.efi`)
	select {
	case <-m.Done():
	case <-time.After(time.Minute):
		t.Fatal("the machine does not stop")
	}
	f, err := os.ReadFile(other)
	if err != nil || !bytes.HasPrefix(f, bytes.Repeat([]byte("foreign "), 4096)) || len(bytes.Trim(f[32768:], "\x00")) != 0 {
		t.Errorf("the other disk was touched (%v)", err)
	}
	lookAt(t, target, manifest)
}

// lookAt checks the disk from outside.
func lookAt(t *testing.T, name string, m firmware.Manifest) {
	t.Helper()
	d, err := disk.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	table, err := disk.ReadTable(d)
	if err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]firmware.File{firmware.LabelRootA: m.Slot.Root, firmware.LabelVerityA: m.Slot.Verity} {
		p, err := disk.Part(d, table, label)
		if err != nil {
			t.Fatal(err)
		}
		if sum, err := disk.Digest(p, want.Size); err != nil || sum != want.SHA256 {
			t.Errorf("%s: %v %v", label, sum, err)
		}
	}
	p, err := disk.Part(d, table, firmware.LabelMeta)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := disk.ReadMeta(p)
	if err != nil || rec.Slots[firmware.SlotA].State != firmware.SlotStaged || rec.Installed != "o-1" {
		t.Errorf("%+v %v", rec, err)
	}
}

// blobsDisk writes a disk with an image's files and their index.
func blobsDisk(t *testing.T, name string, key *ecdsa.PrivateKey, uki, loader []byte) firmware.Manifest {
	t.Helper()
	root, verity := filler(1, 6*firmware.ChunkSize+4096), filler(2, 64<<10)
	chunks, err := firmware.Chunks(bytes.NewReader(root))
	if err != nil {
		t.Fatal(err)
	}
	file := func(n string, b []byte) firmware.File {
		return firmware.File{File: n, Size: int64(len(b)), SHA256: sha256.Sum256(b)}
	}
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: firmware.Digest{1}}}
	pcr, err := firmware.PCR11(sections)
	if err != nil {
		t.Fatal(err)
	}
	boot := file("edge-1-amd64.efi", uki)
	m := firmware.Manifest{Format: firmware.ManifestFormat, Name: "edge", Version: "1", Kind: fleet.ImageSlot, Arch: "amd64", File: boot.File, SHA256: boot.SHA256, Size: boot.Size,
		Measurements: firmware.Measurements{Authenticode: firmware.Digest{2}, Kernel: firmware.Digest{3}, Loader: firmware.Digest{4}, PCR11: pcr, Sections: sections},
		Created:      time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		Slot: &firmware.SlotImage{Root: file("edge.root", root), Verity: file("edge.verity", verity), Loader: file("edge.loader.efi", loader), RootHash: firmware.Digest{5},
			RootUUID: "11111111-1111-1111-1111-111111111111", VerityUUID: "22222222-2222-2222-2222-222222222222", ChunkSize: firmware.ChunkSize, Chunks: chunks}}
	payload, err := m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	e, err := statement.Sign(firmware.ManifestType, payload, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(crypto.PublicKey(&key.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	at, blobs := int64(1<<20), map[string]int64{}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{uki, root, verity, loader} {
		sum := sha256.Sum256(b)
		blobs[hex.EncodeToString(sum[:])] = at
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		at += (int64(len(b)) + 4095) / 4096 * 4096
	}
	ix, err := json.Marshal(map[string]any{"key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), "manifest": e.JSON(),
		"image": boot.SHA256.String(), "blobs": blobs})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(ix, 0)
	if err = errors.Join(err, f.Truncate((at+1<<20)/(1<<20)*(1<<20)), f.Close()); err != nil {
		t.Fatal(err)
	}
	return m
}

// anyRoot is a certificate that nothing here uses.
func anyRoot(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Unix(1e9, 0), NotAfter: time.Unix(4e9, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
