package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/sqlite"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/fleet/text"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"muster": main})
}

// TestScripts runs testdata/script: each file is a story of commands with
// what they print.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("XDG_CONFIG_HOME", e.WorkDir+"/.config")
			e.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve": scriptServe, "halt": scriptHalt, "seed": scriptSeed, "tamper": scriptTamper, "rootcert": scriptRoot,
			"manifest": scriptManifest, "pick": scriptPick, "rc": scriptExit, "enrolled": scriptEnrolled, "isolate": scriptIsolate, "clean": scriptClean,
			"reported": scriptReported, "sealed": scriptSealed, "offers": scriptOffers, "truncate": scriptTruncate,
			"canaries": scriptCanaries, "bundled": scriptBundled,
			"slotimage": scriptSlotImage, "system": scriptSystem,
		},
	})
}

// scriptServe: serve DIR [FLAG...] starts a centre on free ports and returns
// when it is ready.
func scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[0])
	cmd := exec.Command("muster", append([]string{"serve", "--data", dir, "--listen-operators", "127.0.0.1:0", "--listen-nodes", "127.0.0.1:0", "--metrics", "127.0.0.1:0"}, args[1:]...)...)
	for _, name := range []string{"PATH", "HOME"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Dir = ts.MkAbs(".")
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	ts.Check(cmd.Start())
	ready := make(chan string, 1)
	go func() {
		b := make([]byte, 4096)
		n, _ := out.Read(b) // nothing read says it all
		ready <- string(b[:n])
	}()
	select {
	case line := <-ready:
		if !strings.HasPrefix(line, "muster serves") {
			_ = cmd.Wait() // it ended: its words are the news
			ts.Fatalf("serve: %s %s", line, &stderr)
		}
	case <-time.After(60 * time.Second):
		_ = cmd.Process.Kill()
		ts.Fatalf("serve: not ready: %s", &stderr)
	}
	servers[dir] = cmd
	ts.Defer(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
}

var servers = make(map[string]*exec.Cmd)

// scriptHalt: halt DIR stops the centre in good order.
func scriptHalt(ts *testscript.TestScript, neg bool, args []string) {
	cmd := servers[ts.MkAbs(args[0])]
	ts.Check(cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err != nil {
		ts.Fatalf("serve ended with %v: %s", err, cmd.Stderr)
	}
}

// seed: seed DIR NAME [identity boot] files the request of a machine, as the
// enrollment service does after its checks. The name "hostile" has texts that
// attack whoever shows them.
func scriptSeed(ts *testscript.TestScript, neg bool, args []string) {
	s, err := sqlite.Open(context.Background(), sqlite.Config{Path: filepath.Join(ts.MkAbs(args[0]), "muster.db")})
	ts.Check(err)
	defer s.Close()
	ts.Check(s.Update(context.Background(), func(t store.Tx) error {
		f := enroll.Filing{Tenant: "default", Evidence: evidence(args[1]), Source: "192.0.2.1", Begun: time.Now()}
		f.Findings = []fleet.Finding{{Check: "ek certificate", OK: true, Detail: "chains to a root"}, {Check: "event log", OK: false, Detail: "empty"}}
		if len(args) > 3 {
			ts.Check(f.Evidence.Identity.UnmarshalText([]byte(args[2])))
			ts.Check(f.Evidence.Boot.UnmarshalText([]byte(args[3])))
		}
		requests, err := t.RequestsOfNode("default", f.Evidence.EK.NodeID())
		if err != nil {
			return err
		}
		d, err := enroll.File(time.Now(), enroll.Known{Requests: requests}, f)
		if err != nil {
			return err
		}
		for _, o := range d.Others {
			if err := t.PutRequest(o, o.Revision-1); err != nil {
				return err
			}
		}
		ts.Setenv("ID_"+args[1], string(d.Request.ID))
		ts.Setenv("NODE_"+args[1], string(d.Request.Node))
		ts.Setenv("WORDS_"+args[1], d.Request.Words)
		_, err = t.AddEvent(fleet.Event{Tenant: "default", Time: time.Now(), Kind: "request.filed", Request: d.Request.ID, Text: text.Clean("machine "+d.Request.Evidence.Hardware.Product, 200)})
		return errors.Join(err, t.AddRequest(d.Request))
	}))
}

func evidence(name string) fleet.Evidence {
	h := func(s string) fleet.HexBytes { b := sha256.Sum256([]byte(s)); return b[:] }
	base, _, _ := strings.Cut(name, "_") // NAME_x is the same TPM with other evidence
	e := fleet.Evidence{
		EK: fleet.EKHash(h("ek " + base)), AKName: h("ak"), LDevIDName: h("name"), LDevIDKey: h("key " + base),
		Identity: fleet.IdentityHardware, Boot: fleet.BootMeasured, Image: "recovery@1", Serial: "S-" + name, UUID: "U-" + base,
		PCRs:     map[int]fleet.HexBytes{0: h("0")},
		Hardware: fleet.Hardware{Vendor: "ACME", Product: "Box " + base, Serial: "S-" + name, NICs: []fleet.NIC{{Name: "eth0", MAC: "52:54:00:00:00:01", Link: true}}},
	}
	if name == "hostile" {
		evil := "<script>alert(1)</script>\x1b[2J\x1b]0;pwned\x07\u202egnp.exe\u0085\u009b31m\t=cmd|'/C calc'!A0 {{.}} ${x}\r\nroot:"
		e.Hardware = fleet.Hardware{Vendor: evil, Product: evil, Serial: evil, Board: evil, CPU: evil, TPMVendor: evil,
			NICs: []fleet.NIC{{Name: evil, MAC: evil, Driver: evil}}, Disks: []fleet.Disk{{Path: evil, Model: evil}}, Devices: []fleet.Device{{Bus: evil}}}
		e.Serial, e.EKIssuer, e.TPMVendor = evil, evil, evil
	}
	return e
}

// tamper: tamper DIR SEQ changes a record of the audit log in the database
// file.
func scriptTamper(ts *testscript.TestScript, neg bool, args []string) {
	// The driver is registered by the store's package.
	db, err := sql.Open("sqlite", filepath.Join(ts.MkAbs(args[0]), "muster.db"))
	ts.Check(err)
	defer db.Close()
	r, err := db.Exec(`UPDATE audit SET body = replace(body, '"actor":"', '"actor":"x') WHERE seq = ?`, args[1])
	ts.Check(err)
	if n, err := r.RowsAffected(); err != nil || n != 1 {
		ts.Fatalf("tamper: %d rows, %v", n, err)
	}
}

// rootcert: rootcert FILE writes a self-signed CA certificate.
func scriptRoot(ts *testscript.TestScript, neg bool, args []string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test TPM Root\x1b[31m"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
}

// manifest: manifest DIR VERSION KEY writes a manifest signed by the key in
// the PEM file KEY, as `muster release keygen` wrote it.
func scriptManifest(ts *testscript.TestScript, neg bool, args []string) {
	signer, err := readReleaseKey(ts.MkAbs(args[2]))
	ts.Check(err)
	h := sha256.Sum256([]byte(args[1]))
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: firmware.Digest(h)}}
	pcr11, err := firmware.PCR11(sections)
	ts.Check(err)
	m := firmware.Manifest{
		Format: firmware.ManifestFormat, Name: "recovery", Version: args[1], Kind: fleet.ImageRecovery, Arch: "amd64", File: "recovery.efi",
		SHA256: firmware.Digest(h), Size: 1, Created: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		Parts:        []firmware.Part{{Name: "kernel", Size: 1}},
		Measurements: firmware.Measurements{Authenticode: firmware.Digest(h), PCR11: pcr11, Kernel: firmware.Digest(h), Sections: sections},
	}
	payload, err := m.JSON()
	ts.Check(err)
	env, err := statement.Sign(firmware.ManifestType, payload, signer)
	ts.Check(err)
	b, err := json.Marshal(env)
	ts.Check(err)
	ts.Check(os.MkdirAll(ts.MkAbs(args[0]), 0o755))
	ts.Check(os.WriteFile(filepath.Join(ts.MkAbs(args[0]), "manifest.dsse.json"), b, 0o644))
}

// pick: pick NAME REGEXP sets NAME to the first group of the regular
// expression in the last command's output.
func scriptPick(ts *testscript.TestScript, neg bool, args []string) {
	m := regexp.MustCompile(args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if m == nil {
		ts.Fatalf("pick: no %s in the output", args[1])
	}
	ts.Setenv(args[0], m[1])
}

// rc: rc CODE COMMAND... runs a command and wants this exit code.
func scriptExit(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("rc: %v", err)
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// clean: clean STREAM fails if the last command wrote anything that acts on a
// terminal.
func scriptClean(ts *testscript.TestScript, neg bool, args []string) {
	for _, r := range ts.ReadFile(args[0]) {
		if r != '\n' && r != ' ' && (r < 0x20 || r >= 0x7f && r <= 0x9f || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff) {
			ts.Fatalf("%s holds %U", args[0], r)
		}
	}
}
