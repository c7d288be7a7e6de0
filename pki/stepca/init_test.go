package stepca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		files[path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestInitIsIdempotent(t *testing.T) {
	_, dir := newCA(t)
	before := contents(t, dir)
	created, err := Init(dir, Options{Now: testNow.AddDate(1, 0, 0), Name: "other"})
	if err != nil || created {
		t.Errorf("second Init: created %v, error %v", created, err)
	}
	after := contents(t, dir)
	if len(before) != len(after) {
		t.Errorf("there were %d files, now %d", len(before), len(after))
	}
	for name, b := range before {
		if after[name] != b {
			t.Errorf("%s was changed", name)
		}
	}
	for name := range after {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, ".key") && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
}

func TestInitRefusesBadOptions(t *testing.T) {
	if _, err := Init(t.TempDir(), Options{}); err == nil {
		t.Error("a CA was made at no time")
	}
	if _, err := Init(t.TempDir(), Options{Now: testNow, Name: strings.Repeat("x", 65)}); err == nil {
		t.Error("a CA was made with a name that X.509 cannot hold")
	}
}

func TestInitDoesNotRepairAHalfCA(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(caDir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if created, err := Init(dir, Options{Now: testNow}); created || err != nil {
		t.Errorf("created %v, error %v; a folder that is there is never touched", created, err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("an empty folder was opened as a CA")
	}
}

func TestTheTreeOfCAs(t *testing.T) {
	a, _ := newCA(t)
	root, node, server := a.Root(), a.NodeCA(), a.ServerCA()
	if got := root.NotAfter.Sub(testNow); got != rootLifetime {
		t.Errorf("the root lives %v", got)
	}
	if root.MaxPathLen != 1 || node.MaxPathLen != 0 || !node.MaxPathLenZero || server.MaxPathLen != 0 || !server.MaxPathLenZero {
		t.Errorf("path lengths are %d, %d, %d", root.MaxPathLen, node.MaxPathLen, server.MaxPathLen)
	}
	for _, ca := range []*x509.Certificate{node, server} {
		if got := ca.NotAfter.Sub(testNow); got != caLifetime {
			t.Errorf("%s lives %v", ca.Subject, got)
		}
		if err := ca.CheckSignatureFrom(root); err != nil {
			t.Errorf("%s: %v", ca.Subject, err)
		}
	}
	if !node.PermittedDNSDomainsCritical || len(node.PermittedDNSDomains) != 1 || node.PermittedDNSDomains[0] != "node.muster.internal" {
		t.Errorf("the node CA may sign for %v", node.PermittedDNSDomains)
	}
	if node.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || server.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth {
		t.Error("the CAs are not kept to their use")
	}
}

// childDir makes the test binary run Init and die in its nth step.
const childDir, childStep = "MUSTER_TEST_CA_DIR", "MUSTER_TEST_CA_STEP"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		stepped = func(step string) {
			if step == os.Getenv(childStep) {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
		if strings.HasPrefix(os.Getenv(childStep), "rotate.") {
			if _, err := Rotate(dir, "", testNow.Add(time.Hour)); err != nil {
				os.Exit(3)
			}
			os.Exit(0)
		}
		if _, err := Init(dir, Options{Now: testNow}); err != nil {
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestAKillLeavesNothingOrAWholeCA(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	steps := []string{rootCert, rootKey, nodeCert, nodeKey, serverCert, serverKey, "written", "renamed", "never"}
	for _, step := range steps {
		dir := t.TempDir()
		child := exec.CommandContext(t.Context(), self)
		child.Env = append(os.Environ(), childDir+"="+dir, childStep+"="+step)
		err := child.Run()
		var exit *exec.ExitError
		if killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL; killed != (step != "never") {
			t.Fatalf("%s: the child ended with %v", step, err)
		}
		whole := step == "renamed" || step == "never"
		if _, err := os.Stat(caDir(dir)); errors.Is(err, fs.ErrNotExist) == whole {
			t.Errorf("killed after %s: DIR/ca is there: %v, want %v", step, err == nil, whole)
		}
		before := contents(t, dir)
		created, err := Init(dir, Options{Now: testNow.Add(time.Hour)})
		if err != nil || created == whole {
			t.Errorf("killed after %s: the next Init: created %v, error %v", step, created, err)
		}
		if _, err := Open(dir); err != nil {
			t.Errorf("killed after %s: %v", step, err)
		}
		if whole {
			for name, b := range before {
				if contents(t, dir)[name] != b {
					t.Errorf("killed after %s: %s was changed by the next Init", step, name)
				}
			}
		}
		left, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
		if err != nil || len(left) > 0 {
			t.Errorf("killed after %s: left behind: %v", step, left)
		}
	}
}

func TestTheRootKeyCanBeTakenAway(t *testing.T) {
	_, dir := newCA(t)
	to := filepath.Join(t.TempDir(), "safe")
	if err := ExportRoot(dir, to, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(caDir(dir), rootKey)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root key is still there: %v", err)
	}
	if _, err := readKey(filepath.Join(to, rootKey)); err != nil {
		t.Errorf("the copy: %v", err)
	}
	a, err := Open(dir)
	if err != nil {
		t.Fatalf("without the root key: %v", err)
	}
	if _, _, _, _, err := a.IssueNode(t.Context(), testProfile(t)); err != nil {
		t.Errorf("without the root key: %v", err)
	}
	if created, err := Init(dir, Options{Now: testNow}); created || err != nil {
		t.Errorf("Init without the root key: created %v, error %v", created, err)
	}
	if err := ExportRoot(dir, to, false); err == nil {
		t.Error("a key that is away was exported")
	}
}

func TestExportNeverReplaces(t *testing.T) {
	_, dir := newCA(t)
	to := t.TempDir()
	if err := os.WriteFile(filepath.Join(to, rootKey), []byte("older"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ExportRoot(dir, to, true); err == nil {
		t.Error("it was replaced")
	}
	if b, _ := os.ReadFile(filepath.Join(to, rootKey)); string(b) != "older" {
		t.Error("the older file was changed")
	}
	if _, err := readKey(filepath.Join(caDir(dir), rootKey)); err != nil {
		t.Errorf("the key is gone although the copy failed: %v", err)
	}
}

func TestOpenRefusesADamagedCA(t *testing.T) {
	other, _ := newCA(t)
	for name, damage := range map[string]func(t *testing.T, ca string){
		"key others may read": func(t *testing.T, ca string) { must(t, os.Chmod(filepath.Join(ca, nodeKey), 0o644)) },
		"missing key":         func(t *testing.T, ca string) { must(t, os.Remove(filepath.Join(ca, nodeKey))) },
		"missing certificate": func(t *testing.T, ca string) { must(t, os.Remove(filepath.Join(ca, serverCert))) },
		"keys swapped": func(t *testing.T, ca string) {
			must(t, os.Rename(filepath.Join(ca, serverKey), filepath.Join(ca, nodeKey)))
		},
		"foreign root":            func(t *testing.T, ca string) { put(t, filepath.Join(ca, rootCert), other.RootsPEM()) },
		"leaf for a CA":           func(t *testing.T, ca string) { put(t, filepath.Join(ca, nodeCert), leafPEM(t, other)) },
		"two certificates":        func(t *testing.T, ca string) { put(t, filepath.Join(ca, rootCert), bytes.Repeat(other.RootsPEM(), 2)) },
		"certificate in key file": func(t *testing.T, ca string) { put(t, filepath.Join(ca, nodeKey), other.RootsPEM()) },
		"huge file":               func(t *testing.T, ca string) { put(t, filepath.Join(ca, rootCert), make([]byte, 1<<20)) },
		"empty file":              func(t *testing.T, ca string) { put(t, filepath.Join(ca, rootCert), nil) },
	} {
		_, dir := newCA(t)
		damage(t, caDir(dir))
		if _, err := Open(dir); err == nil {
			t.Errorf("%s: it was opened", name)
		}
	}
}

func FuzzParseBlock(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\nrest"))
	f.Fuzz(func(t *testing.T, content []byte) {
		der, err := parseBlock(content, "x", "CERTIFICATE")
		if err != nil {
			return
		}
		if again, err := parseBlock(encodeCertificate(der), "x", "CERTIFICATE"); err != nil || !bytes.Equal(again, der) {
			t.Fatalf("what was read cannot be written and read again: %v", err)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, path string, content []byte) {
	t.Helper()
	must(t, os.WriteFile(path, content, 0o600))
}

func leafPEM(t *testing.T, a *Authority) []byte {
	t.Helper()
	chain, _, _, _, err := a.IssueNode(t.Context(), testProfile(t))
	must(t, err)
	return encodeCertificate(chain[0])
}
