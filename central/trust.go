package central

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
)

const (
	// rootsEvery is how often the directory of EK roots is looked at.
	rootsEvery = 2 * time.Second
	// maxRootFile bounds a file of EK roots; vendors ship dozens of roots.
	maxRootFile = 1 << 20
	maxRoots    = 1000
)

// Root is one trusted EK root certificate.
type Root struct {
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	SHA256   string    `json:"sha256"`
	NotAfter time.Time `json:"not_after"`
	Lab      bool      `json:"lab"`
}

// rootSet is what the directory of roots held when it was read.
type rootSet struct {
	ekcert.Roots
	// mark changes when a file does.
	mark string
}

func loadRoots(dir string) (rootSet, error) {
	mark, err := markOf(dir)
	if err != nil {
		return rootSet{}, err
	}
	r, err := ekcert.LoadRoots(dir)
	if err != nil {
		return rootSet{}, fmt.Errorf("central: read EK roots: %w", err)
	}
	return rootSet{r, mark}, nil
}

// markOf is a text that changes when a file of the directory does.
func markOf(dir string) (string, error) {
	var b strings.Builder
	for _, d := range []string{dir, filepath.Join(dir, ekcert.LabDir)} {
		entries, err := os.ReadDir(d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("central: read EK roots: %w", err)
		}
		for _, e := range entries {
			if info, err := e.Info(); err == nil {
				fmt.Fprintf(&b, "%q %d %d\n", filepath.Join(d, e.Name()), info.Size(), info.ModTime().UnixNano())
			}
		}
	}
	return b.String(), nil
}

func (s rootSet) hasLab() bool {
	return slices.ContainsFunc(s.All, func(r ekcert.Root) bool { return r.Lab })
}

func (s rootSet) list() []Root {
	out := make([]Root, 0, len(s.All))
	for _, r := range s.All {
		out = append(out, rootOf(r.File, r.Certificate, r.Lab))
	}
	return out
}

func rootOf(file string, c *x509.Certificate, lab bool) Root {
	sum := sha256.Sum256(c.Raw)
	return Root{
		File: text.Clean(file, 128), Subject: text.Clean(c.Subject.String(), 256), SHA256: hex.EncodeToString(sum[:]),
		NotAfter: c.NotAfter, Lab: lab,
	}
}

// trust is the verification policy, kept up to date with the files and the
// database.
type trust struct {
	store store.Store
	dir   string
	now   func() time.Time

	mu     sync.Mutex
	set    rootSet
	looked time.Time
	images map[string]cachedImages
}

type cachedImages struct {
	images []fleet.Image
	read   time.Time
}

// roots returns the current set, reading the directory again if it changed.
// A lab root that somebody put there by hand marks the tenant just as an
// imported one does.
func (tr *trust) roots(ctx context.Context) (rootSet, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	now := tr.now()
	if !tr.looked.IsZero() && now.Sub(tr.looked).Abs() < rootsEvery {
		return tr.set, nil
	}
	if mark, err := markOf(tr.dir); err == nil && !tr.looked.IsZero() && mark == tr.set.mark {
		tr.looked = now
		return tr.set, nil
	}
	set, err := loadRoots(tr.dir)
	if err != nil {
		return tr.set, err
	}
	if set.hasLab() {
		if err := markLab(ctx, tr.store, act{actor: "system", now: now}, "a file in the directory of lab roots"); err != nil {
			return tr.set, err
		}
	}
	tr.set, tr.looked = set, now
	return set, nil
}

// forget makes the next look read everything again.
func (tr *trust) forget() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.looked, tr.images = time.Time{}, nil
}

// policy implements service.PolicyFunc.
func (tr *trust) policy(ctx context.Context, tenant string, now time.Time) (pki.Policy, error) {
	set, err := tr.roots(ctx)
	if err != nil {
		return pki.Policy{}, err
	}
	c, err := tr.cached(ctx, tenant, now)
	if err != nil {
		return pki.Policy{}, err
	}
	return pki.Policy{
		Now: now, TimeFloor: timeFloor, VendorRoots: set.Vendor, LabRoots: set.Lab,
		Intermediates: set.Intermediates, RootNames: set.Names,
		Listed: func(ek fleet.EKHash) bool { return tr.listed(ctx, tenant, ek) },
		Images: c.images,
	}, nil
}

// timeFloor is surely past: it is when this was written.
var timeFloor = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// listed tells whether an operator named the EK beforehand, in a list that was
// not removed; a list that has ended, or a line that was used, still says
// whose machine it is. If the store fails the answer is no: then filing the
// request, which needs the store as well, fails too.
func (tr *trust) listed(ctx context.Context, tenant string, ek fleet.EKHash) bool {
	var lines []store.ListLine
	err := tr.store.View(ctx, func(t store.Reader) (err error) {
		lines, err = t.LinesOfEK(tenant, ek)
		return err
	})
	return err == nil && len(lines) > 0
}

// cached returns the tenant's images, at most two seconds old
// where another process changed them, at once where this one did.
func (tr *trust) cached(ctx context.Context, tenant string, now time.Time) (cachedImages, error) {
	tr.mu.Lock()
	c, there := tr.images[tenant]
	tr.mu.Unlock()
	if there && now.Sub(c.read) < rootsEvery {
		return c, nil
	}
	c = cachedImages{read: now}
	err := tr.store.View(ctx, func(t store.Reader) (err error) {
		c.images, err = t.Images(tenant)
		return err
	})
	if err != nil {
		return c, err
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.images == nil {
		tr.images = make(map[string]cachedImages)
	}
	tr.images[tenant] = c
	return c, nil
}

// markLab marks the default tenant as a lab, for ever.
func markLab(ctx context.Context, s store.Store, by act, why string) error {
	return s.Update(ctx, func(t store.Tx) error {
		tenant, err := t.Tenant(DefaultTenant)
		if err != nil || tenant.Lab {
			return err
		}
		tenant.Lab, tenant.Updated = true, by.now
		if _, err := t.PutTenant(tenant); err != nil {
			return err
		}
		if err := by.record(t, tenant.Name, audit.TenantMarkedLab, "tenant/"+tenant.Name, nil, nil, why); err != nil {
			return err
		}
		_, err = t.AddEvent(fleet.Event{
			Tenant: tenant.Name, Time: by.now, Level: fleet.EventAlarm, Kind: "tenant.marked-lab",
			Text: "this tenant trusts, or has trusted, a lab root: its identities are not worth more than that",
		})
		return err
	})
}

// badRoots: what was given to import is at fault.
type badRoots struct{ err error }

func (e *badRoots) Error() string { return e.err.Error() }

// importRoots writes certificates into the directory, one file each, named
// by their content, so that importing twice changes nothing.
func importRoots(ctx context.Context, s store.Store, dir string, by act, files [][]byte, lab bool, reason string) ([]Root, error) {
	var certs []*x509.Certificate
	for _, b := range files {
		if len(b) > maxRootFile {
			return nil, &badRoots{fmt.Errorf("central: import roots: a file of %d bytes, at most %d are allowed", len(b), maxRootFile)}
		}
		c, err := ekcert.ParseRoots(b)
		if err != nil {
			return nil, &badRoots{fmt.Errorf("central: import roots: %w", err)}
		}
		certs = append(certs, c...)
	}
	if len(certs) == 0 || len(certs) > maxRoots {
		return nil, &badRoots{fmt.Errorf("central: import roots: %d certificates; want 1 to %d", len(certs), maxRoots)}
	}
	if lab {
		dir = filepath.Join(dir, ekcert.LabDir)
		// First the mark, then the trust: never the other way round.
		if err := markLab(ctx, s, by, "import of a lab root"); err != nil {
			return nil, err
		}
	}
	roots := make([]Root, len(certs))
	for i, c := range certs {
		sum := sha256.Sum256(c.Raw)
		roots[i] = rootOf(fileName(c)+"-"+hex.EncodeToString(sum[:8])+".pem", c, lab)
	}
	// First the record, then the trust: files and rows have no common commit,
	// and a root that is trusted without a record is the worse of the two.
	err := s.Update(ctx, func(t store.Tx) error {
		return by.record(t, DefaultTenant, audit.RootsImported, "tenant/"+DefaultTenant, nil, roots, reason)
	})
	if err != nil {
		return nil, err
	}
	for i, c := range certs {
		b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		if err := renameio.WriteFile(filepath.Join(dir, roots[i].File), b, 0o644); err != nil {
			return nil, fmt.Errorf("central: import roots: %w", err)
		}
	}
	return roots, nil
}

func fileName(c *x509.Certificate) string {
	n := text.ForLabel(c.Subject.CommonName)
	if n == "" {
		n = "root"
	}
	return strings.ToLower(n[:min(len(n), 40)])
}
