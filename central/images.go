package central

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
)

// registerImage takes an image whose manifest a release key of the tenant
// signed. Registering the same image again changes nothing.
func (s *Server) registerImage(ctx context.Context, c caller, envelope []byte) (image fleet.Image, created bool, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		image, created, err = addImage(t, by, c.Tenant, envelope)
		return err
	})
	if err == nil {
		s.trust.forget()
		s.documentsStale()
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return image, created, err
}

func addImage(t store.Tx, by act, tenant string, envelope []byte) (fleet.Image, bool, error) {
	keys, err := releaseKeys(t, tenant)
	if err != nil {
		return fleet.Image{}, false, err
	}
	m, err := firmware.OpenManifest(envelope, keys)
	if errors.Is(err, statement.ErrUntrusted) {
		return fleet.Image{}, false, &enroll.Refused{Why: "no release key that the tenant trusts has signed this manifest", Do: "sign the image with a known release key, or add the key after checking it: muster image register --release-pub FILE.pub"}
	}
	if err != nil {
		return fleet.Image{}, false, err
	}
	image := m.Image()
	image.Tenant, image.Manifest, image.Registered = tenant, envelope, by.now
	if err := image.Validate(); err != nil {
		return fleet.Image{}, false, err
	}
	old, err := t.Image(tenant, image.Name, image.Version, image.Arch)
	switch {
	case err == nil && bytes.Equal(old.SHA256, image.SHA256):
		return old, false, nil
	case err == nil:
		return old, false, &enroll.Refused{Why: fmt.Sprintf("image %s for %s is registered with another digest", image.ID(), image.Arch), Do: "a version never changes: build it under a new one"}
	case !errors.Is(err, store.ErrNotFound):
		return fleet.Image{}, false, err
	}
	if err := t.AddImage(image); err != nil {
		return fleet.Image{}, false, err
	}
	short := image
	short.Manifest = nil
	if err := by.record(t, tenant, audit.ImageRegistered, "image/"+image.ID(), nil, short, ""); err != nil {
		return fleet.Image{}, false, err
	}
	_, err = t.AddEvent(fleet.Event{Tenant: tenant, Time: by.now, Kind: "image.registered", Text: fmt.Sprintf("image %s for %s was registered by %s", image.ID(), image.Arch, by.actor)})
	return image, true, err
}

// trustReleaseKeys adds public keys (PEM) to those whose signature on an
// image manifest counts in the tenant.
func trustReleaseKeys(t store.Tx, by act, tenant string, pemText []byte, reason string) (ids []string, added bool, err error) {
	keys, err := statement.ParseKeys(pemText)
	if err != nil {
		return nil, false, fmt.Errorf("central: read release key: %w", err)
	}
	for _, k := range keys {
		id, err := statement.KeyID(k)
		if err != nil {
			return nil, false, fmt.Errorf("central: read release key: %w", err)
		}
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, false, fmt.Errorf("central: read release key: %w", err)
		}
		isNew, err := t.AddReleaseKey(store.ReleaseKey{
			Tenant: tenant, KeyID: id, Added: by.now, PEM: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		})
		if err != nil {
			return nil, false, err
		}
		ids = append(ids, id)
		if !isNew {
			continue
		}
		added = true
		if err := by.record(t, tenant, audit.TenantChanged, "tenant/"+tenant, nil, map[string]string{"release_key": id}, reason); err != nil {
			return nil, false, err
		}
	}
	return ids, added, nil
}
