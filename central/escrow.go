package central

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// keyIDOf names an X25519 public key: the first 8 bytes of its SHA-256, hex.
func keyIDOf(key []byte) string {
	if len(key) == 0 {
		return ""
	}
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// trustEscrowKey sets the key that sites seal their snapshots to. The charters
// follow.
func (s *Server) trustEscrowKey(ctx context.Context, c caller, key []byte, reason string) (changed bool, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		if changed = !bytes.Equal(tenant.EscrowKey, key); !changed {
			return nil
		}
		before := keyIDOf(tenant.EscrowKey)
		tenant.EscrowKey = key
		if err := tenant.Validate(); err != nil {
			return &enroll.Refused{Why: err.Error()}
		}
		if _, err := t.PutTenant(tenant); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.TenantChanged, "tenant/"+c.Tenant, map[string]string{"escrow_key": before}, map[string]string{"escrow_key": keyIDOf(key)}, reason); err != nil {
			return err
		}
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: c.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "tenant.escrow-key",
			Text: fmt.Sprintf("the escrow key is %s now (%s)", keyIDOf(key), by.actor),
		}))
		return err
	})
	if err == nil && changed {
		s.documentsStale()
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return changed, err
}
