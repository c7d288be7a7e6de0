package stepca

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func open(t *testing.T, dir string) *Authority {
	t.Helper()
	a, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func issue(t *testing.T, a *Authority, at time.Time) [][]byte {
	t.Helper()
	p := testProfile(t)
	p.Now = at
	chain, _, _, _, err := a.IssueNode(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

func clientOf(t *testing.T, a *Authority, leaf []byte, at time.Time) error {
	t.Helper()
	c, err := x509.ParseCertificate(leaf)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Verify(x509.VerifyOptions{Roots: a.ClientPool(), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err
}

func TestRotate(t *testing.T) {
	a, dir := newCA(t)
	at := testNow.Add(time.Hour)
	first := issue(t, a, at)
	stranger, _ := newCA(t)
	foreign := issue(t, stranger, at)
	for n := 2; n <= 3; n++ {
		cert, err := Rotate(dir, "", at)
		if err != nil {
			t.Fatal(err)
		}
		a = open(t, dir)
		if !a.NodeCA().Equal(cert) || len(a.RetiredNodeCAs()) != n-1 {
			t.Errorf("rotation %d: the issuer is %s, %d retired", n, a.NodeCA().Subject, len(a.RetiredNodeCAs()))
		}
		next := issue(t, a, at)
		if string(next[1]) != string(cert.Raw) || string(next[1]) == string(first[1]) {
			t.Error("the new CA does not issue")
		}
		for name, leaf := range map[string][]byte{"old": first[0], "new": next[0]} {
			if err := clientOf(t, a, leaf, at); err != nil {
				t.Errorf("rotation %d: the %s leaf: %v", n, name, err)
			}
			if clientOf(t, a, leaf, at.Add(31*24*time.Hour)) == nil {
				t.Errorf("rotation %d: the %s leaf never ends", n, name)
			}
		}
		if clientOf(t, a, foreign[0], at) == nil {
			t.Error("a foreign leaf is taken")
		}
		openssl(t, a, first, true)
		openssl(t, a, next, true)
		openssl(t, a, [][]byte{next[0], first[1]}, false)
		openssl(t, a, foreign, false)
	}
	keys, err := filepath.Glob(filepath.Join(caDir(dir), "node*", nodeKey))
	if err != nil || len(keys) != 1 {
		t.Errorf("keys of node CAs: %v, %v", keys, err)
	}
	if _, err := os.Stat(filepath.Join(caDir(dir), nodeKey)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first CA's key is still there: %v", err)
	}
	if info, err := os.Stat(keys[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	// A generation that is missing is a fault for people to look at.
	if err := os.RemoveAll(generationDir(caDir(dir), 2)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a missing generation is not noticed")
	}
}

// openssl says whether the leaf verifies below the root by way of its CA.
func openssl(t *testing.T, a *Authority, chain [][]byte, want bool) {
	t.Helper()
	program, err := exec.LookPath("openssl")
	if err != nil {
		t.Log("openssl is not installed: the chain is checked by Go alone")
		return
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"r.pem": a.RootsPEM(), "i.pem": encodeCertificate(chain[1]), "l.pem": encodeCertificate(chain[0])} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := testNow.Add(2 * time.Hour).Unix()
	cmd := exec.CommandContext(t.Context(), program, "verify", "-x509_strict", "-attime", big.NewInt(at).String(),
		"-purpose", "sslclient", "-CAfile", "r.pem", "-untrusted", "i.pem", "l.pem")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); (err == nil) != want {
		t.Errorf("openssl verify: %s, want %v", out, want)
	}
}

func TestRotateIsRefused(t *testing.T) {
	_, dir := newCA(t)
	_, other := newCA(t)
	at := testNow.Add(time.Hour)
	before := contents(t, dir)
	safe := filepath.Join(t.TempDir(), "safe")
	for name, c := range map[string]struct {
		key string
		at  time.Time
	}{
		"a foreign root key":   {filepath.Join(caDir(other), rootKey), at},
		"no such key":          {filepath.Join(dir, "nothing"), at},
		"before the root":      {"", testNow.Add(-24 * time.Hour)},
		"beyond the root's":    {"", testNow.Add(8 * 365 * 24 * time.Hour)},
		"no time":              {"", time.Time{}},
		"a certificate as key": {filepath.Join(caDir(dir), rootCert), at},
	} {
		if _, err := Rotate(dir, c.key, c.at); err == nil {
			t.Errorf("%s: rotated", name)
		}
	}
	if err := ExportRoot(dir, safe, true); err != nil {
		t.Fatal(err)
	}
	if _, err := Rotate(dir, "", at); !errors.Is(err, ErrNoRootKey) {
		t.Errorf("without the root key: %v", err)
	}
	for name, b := range before {
		if now := contents(t, dir); now[name] != b && filepath.Base(name) != rootKey {
			t.Errorf("%s was changed by what was refused", name)
		}
	}
	// With the key from where it is kept it works, and the key stays there.
	if _, err := Rotate(dir, filepath.Join(safe, rootKey), at); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(caDir(dir), rootKey)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root key was brought back: %v", err)
	}
}

// TestAKillLeavesTheOldOrTheNewNodeCA kills a rotation after each step.
func TestAKillLeavesTheOldOrTheNewNodeCA(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for step, rotated := range map[string]int{
		"rotate." + nodeCert: 0, "rotate.written": 0, "rotate.renamed": 1, "rotate.old-key-removed": 1, "rotate.never": 1,
	} {
		a, dir := newCA(t)
		leaf := issue(t, a, testNow.Add(time.Hour))
		child := exec.CommandContext(t.Context(), self)
		child.Env = append(os.Environ(), childDir+"="+dir, childStep+"="+step)
		if err := child.Run(); (err == nil) != (step == "rotate.never") {
			t.Fatalf("%s: the child ended with %v", step, err)
		}
		b := open(t, dir)
		if len(b.RetiredNodeCAs()) != rotated || b.NodeCA().Equal(a.NodeCA()) != (rotated == 0) {
			t.Errorf("killed after %s: %d retired", step, len(b.RetiredNodeCAs()))
		}
		at := testNow.Add(2 * time.Hour)
		if err := clientOf(t, b, leaf[0], at); err != nil {
			t.Errorf("killed after %s: the old leaf: %v", step, err)
		}
		issue(t, b, at)
		if _, err := Rotate(dir, "", at); err != nil {
			t.Errorf("killed after %s: the next rotation: %v", step, err)
		}
		if b = open(t, dir); len(b.RetiredNodeCAs()) != rotated+1 {
			t.Errorf("killed after %s: after the next rotation %d retired", step, len(b.RetiredNodeCAs()))
		}
		left, err := filepath.Glob(filepath.Join(caDir(dir), rotateTemp+"*"))
		if err != nil || len(left) > 0 {
			t.Errorf("killed after %s: left behind: %v", step, left)
		}
	}
}
