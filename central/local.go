package central

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/pki/stepca"
)

// Local is a data directory that no centre serves from at the moment: for
// commands on the centre's own host.
type Local struct {
	data  *dataDir
	store store.Store
}

// OpenLocal opens a data directory, making what is missing. The error is
// ErrRunning if a centre serves from it: then the API is the way.
func OpenLocal(ctx context.Context, dir string, now time.Time) (*Local, error) {
	d, err := openDataDir(dir)
	if err != nil {
		return nil, err
	}
	l, err := openLocal(ctx, d, now)
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return l, nil
}

// openLocal opens the database of a directory that is ours. On an error the
// directory stays open.
func openLocal(ctx context.Context, d *dataDir, now time.Time) (*Local, error) {
	s, err := openStore(ctx, "", d)
	if err != nil {
		return nil, err
	}
	l := &Local{d, s}
	if err := ensureTenant(ctx, s, act{actor: "system", now: now}); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return l, nil
}

// Close lets go of the directory.
func (l *Local) Close() error { return errors.Join(l.store.Close(), l.data.close()) }

// Store is the database.
func (l *Local) Store() store.Store { return l.store }

// ImportRoots trusts EK roots. Importing a lab root marks the tenant as a
// lab for ever.
func (l *Local) ImportRoots(ctx context.Context, files [][]byte, lab bool, reason string, now time.Time) ([]Root, error) {
	return importRoots(ctx, l.store, l.data.file(rootsDir), act{actor: "user:local", now: now}, files, lab, reason)
}

// Roots lists what is trusted, and the files that could not be read.
func (l *Local) Roots() (roots []Root, problems []error, err error) {
	set, err := loadRoots(l.data.file(rootsDir))
	return set.list(), set.Problems, err
}

// Tenant returns the tenant.
func (l *Local) Tenant(ctx context.Context) (tenant fleet.Tenant, err error) {
	err = l.store.View(ctx, func(t store.Reader) error {
		tenant, err = t.Tenant(DefaultTenant)
		return err
	})
	return tenant, err
}

// TrustReleaseKeys adds public keys (PEM) whose signature on an image counts.
func (l *Local) TrustReleaseKeys(ctx context.Context, pem []byte, reason string, now time.Time) (ids []string, err error) {
	err = l.store.Update(ctx, func(t store.Tx) error {
		ids, _, err = trustReleaseKeys(t, act{actor: "user:local", now: now}, DefaultTenant, pem, reason)
		return err
	})
	return ids, err
}

// RegisterImage takes an image whose manifest a trusted release key signed.
func (l *Local) RegisterImage(ctx context.Context, envelope []byte, now time.Time) (image fleet.Image, created bool, err error) {
	err = l.store.Update(ctx, func(t store.Tx) error {
		image, created, err = addImage(t, act{actor: "user:local", now: now}, DefaultTenant, envelope)
		return err
	})
	return image, created, err
}

// InitAuthority makes the certificate authority if there is none, and notes
// that in the audit log.
func (l *Local) InitAuthority(ctx context.Context, name string, now time.Time) (created bool, err error) {
	if created, err = stepca.Init(l.data.path, stepca.Options{Now: now, Name: name}); err != nil || !created {
		return created, err
	}
	return true, l.store.Update(ctx, func(t store.Tx) error {
		return act{actor: "user:local", now: now}.record(t, DefaultTenant, audit.AuthorityCreated, "tenant/"+DefaultTenant, nil, nil, "")
	})
}

// RotateAuthority makes a new node CA, which issues from the next start of the
// centre on, and notes that in the audit log. A crash between the two leaves
// the new CA without its record.
func (l *Local) RotateAuthority(ctx context.Context, rootKeyFile, reason string, now time.Time) (*x509.Certificate, error) {
	c, err := stepca.Rotate(l.data.path, rootKeyFile, now)
	if err != nil {
		return nil, err
	}
	after := map[string]any{"node_ca": c.Subject.CommonName, "serial": c.SerialNumber.Text(16), "not_after": c.NotAfter}
	return c, l.store.Update(ctx, func(t store.Tx) error {
		return act{actor: "user:local", now: now}.record(t, DefaultTenant, audit.AuthorityRotated, "tenant/"+DefaultTenant, nil, after, reason)
	})
}

// Audit calls f with every record of the audit log.
func (l *Local) Audit(ctx context.Context, f func(fleet.AuditRecord) error) error {
	return l.store.View(ctx, func(t store.Reader) error {
		for after := uint64(0); ; {
			records, err := t.Audit(DefaultTenant, after, auditPage)
			if err != nil || len(records) == 0 {
				return err
			}
			for _, r := range records {
				if err := f(r); err != nil {
					return err
				}
			}
			after = records[len(records)-1].Seq
		}
	})
}

// VerifyAudit checks the audit log in the database.
func (l *Local) VerifyAudit(ctx context.Context) (audit.Head, *audit.BreakError, error) {
	return VerifyAudit(ctx, l.store, DefaultTenant)
}

// Restored begins a new life of the database after a backup was restored:
// documents of the lost part are never mistaken for new ones, and no founding
// is granted until a site reported or a person confirmed it. It returns the
// new epoch.
func (l *Local) Restored(ctx context.Context, reason string, now time.Time) (epoch uint64, err error) {
	err = l.store.Update(ctx, func(t store.Tx) error {
		epoch, err = raiseEpoch(t, act{actor: "user:local", now: now}, reason)
		return err
	})
	return epoch, err
}
