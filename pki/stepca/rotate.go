package stepca

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ErrNoRootKey: the root's private key is not where a rotation looks for it.
var ErrNoRootKey = errors.New("stepca: the root key is not here: it was taken away; give the file where it is kept")

const (
	// generationPrefix names the folders in DIR/ca of node CAs after the
	// first: node-2, node-3. The highest one issues.
	generationPrefix = "node-"
	rotateTemp       = ".node.new-"
	maxGenerations   = 1000
)

// Rotate makes a new node CA under the root and lets it issue from the next
// Open on. Certificates of the old ones stay good until they or their CA end;
// the old CAs' keys are removed, since nothing is signed with them any more.
// rootKeyFile is the root's private key, "" for the one in DIR/ca; without it
// the error is ErrNoRootKey and nothing has changed.
//
// A new CA comes into being by the rename of a whole folder: a crash leaves
// the old state or the new one.
func Rotate(dir, rootKeyFile string, now time.Time) (*x509.Certificate, error) {
	if now.IsZero() {
		return nil, errors.New("stepca: rotate: the time is not set")
	}
	a, err := Open(dir)
	if err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, ".ca.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if rootKeyFile == "" {
		rootKeyFile = filepath.Join(a.dir, rootKey)
	}
	root, err := readKey(rootKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (no %s)", ErrNoRootKey, rootKeyFile)
	}
	if err != nil {
		return nil, err
	}
	if !root.PublicKey.Equal(a.root.PublicKey) {
		return nil, fmt.Errorf("stepca: rotate: %s is not the key of this root", rootKeyFile)
	}
	now = now.UTC().Truncate(time.Second)
	if now.Before(a.root.NotBefore) || now.Add(caLifetime).After(a.root.NotAfter) {
		return nil, fmt.Errorf("stepca: rotate: a node CA of %d days does not fit into the root's life (%s to %s)",
			caLifetime/(24*time.Hour), a.root.NotBefore.Format(time.DateOnly), a.root.NotAfter.Format(time.DateOnly))
	}
	last, err := generations(a.dir)
	if err != nil {
		return nil, err
	}
	next := last + 1
	if next > maxGenerations {
		return nil, fmt.Errorf("stepca: rotate: this would be node CA number %d", next)
	}
	cert, err := a.writeGeneration(next, root, now)
	if err != nil {
		return nil, err
	}
	return cert, removeOldKeys(a.dir, next)
}

func (a *Authority) writeGeneration(n int, root *ecdsa.PrivateKey, now time.Time) (*x509.Certificate, error) {
	leftovers, err := filepath.Glob(filepath.Join(a.dir, rotateTemp+"*"))
	if err != nil {
		return nil, wrap("rotate", err)
	}
	for _, l := range leftovers {
		if err := os.RemoveAll(l); err != nil {
			return nil, wrap("rotate", err)
		}
	}
	name := "muster"
	if o := a.root.Subject.Organization; len(o) > 0 {
		name = o[0]
	}
	cert, key, err := makeCA(nodeTemplate(name, fmt.Sprintf("node CA %d", n), now), a.root, root)
	if err != nil {
		return nil, err
	}
	encoded, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp(a.dir, rotateTemp+"*")
	if err != nil {
		return nil, wrap("rotate", err)
	}
	defer os.RemoveAll(temp) // after the rename there is nothing left of it
	if err := writeSynced(filepath.Join(temp, nodeCert), encodeCertificate(cert.Raw), 0o644); err != nil {
		return nil, err
	}
	stepped("rotate." + nodeCert)
	if err := writeSynced(filepath.Join(temp, nodeKey), encoded, 0o600); err != nil {
		return nil, err
	}
	if err := syncDir(temp); err != nil {
		return nil, err
	}
	stepped("rotate.written")
	if err := os.Rename(temp, generationDir(a.dir, n)); err != nil {
		return nil, wrap("rotate", err)
	}
	stepped("rotate.renamed")
	return cert, syncDir(a.dir)
}

// removeOldKeys removes the keys of all node CAs before the current one.
func removeOldKeys(ca string, current int) error {
	for n := 1; n < current; n++ {
		if err := os.Remove(filepath.Join(generationDir(ca, n), nodeKey)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return wrap("rotate: remove old key", err)
		}
	}
	stepped("rotate.old-key-removed")
	return syncDir(ca)
}

// generationDir is where the nth node CA lies; the first is in DIR/ca itself.
func generationDir(ca string, n int) string {
	if n == 1 {
		return ca
	}
	return filepath.Join(ca, generationPrefix+strconv.Itoa(n))
}

// generations returns the number of the current node CA. There is none
// missing below it.
func generations(ca string) (int, error) {
	entries, err := os.ReadDir(ca)
	if err != nil {
		return 0, wrap("open", err)
	}
	seen := map[int]bool{1: true}
	last := 1
	for _, e := range entries {
		number, found := strings.CutPrefix(e.Name(), generationPrefix)
		n, err := strconv.Atoi(number)
		if !found || err != nil || n < 2 || n > maxGenerations || strconv.Itoa(n) != number || !e.IsDir() {
			continue
		}
		seen[n] = true
		last = max(last, n)
	}
	for n := 1; n <= last; n++ {
		if !seen[n] {
			return 0, fmt.Errorf("stepca: open: %s is missing, and %s is there", generationDir(ca, n), generationDir(ca, last))
		}
	}
	return last, nil
}

// openNodeCAs opens the current node CA, and reads the certificates of those
// before it.
func (a *Authority) openNodeCAs() error {
	current, err := generations(a.dir)
	if err != nil {
		return err
	}
	for n := 1; n < current; n++ {
		old, err := readCertificate(filepath.Join(generationDir(a.dir, n), nodeCert))
		if err != nil {
			return err
		}
		if err := old.CheckSignatureFrom(a.root); err != nil {
			return fmt.Errorf("stepca: open: node CA %d is not signed by %s: %w", n, rootCert, err)
		}
		a.retired = append(a.retired, old)
	}
	dir, err := filepath.Rel(a.dir, generationDir(a.dir, current))
	if err != nil {
		return wrap("open", err)
	}
	a.node, err = a.openIssuer(filepath.Join(dir, nodeCert), filepath.Join(dir, nodeKey), x509.ExtKeyUsageClientAuth)
	return err
}

// RetiredNodeCAs returns the certificates of the node CAs before the current
// one, oldest first: they issue nothing, and what they issued stays good until
// its end.
func (a *Authority) RetiredNodeCAs() []*x509.Certificate {
	return append([]*x509.Certificate(nil), a.retired...)
}
