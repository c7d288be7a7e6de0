package central

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/google/renameio/v2"
	"sigs.k8s.io/yaml"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/text"
)

// AdminConfig is what a client needs to reach the centre: the content of
// admin.yaml.
type AdminConfig struct {
	// Server is the https URL of the operator endpoint.
	Server string `json:"server"`
	// CA is the PEM of the root that signs the centre's TLS certificate.
	CA string `json:"ca"`
	// Token is the bearer token.
	Token string `json:"token"`
}

// firstStart makes the tenant, the administrator and admin.yaml, as far as
// they are missing. A lost admin.yaml is replaced by one with a new token;
// the old token then ends.
func (s *Server) firstStart(ctx context.Context, operators net.Addr) error {
	s.operatorsURL = s.operatorURL(operators)
	name := s.data.file(AdminFile)
	_, statErr := os.Stat(name)
	if statErr != nil && !errors.Is(statErr, fs.ErrNotExist) {
		return fmt.Errorf("central: look for %s: %w", AdminFile, statErr)
	}
	if statErr == nil {
		return s.renewAdmin(name, operators)
	}
	return s.newStartToken(ctx)
}

// localAdmin is the administrator of the centre's own host.
const localAdmin = "admin"

// newStartToken writes admin.yaml with a new token. The one before it ends.
func (s *Server) newStartToken(ctx context.Context) error {
	now := s.cfg.Now()
	by := act{actor: "system", now: now}
	name := s.data.file(AdminFile)
	cred, token := newCredential(store.CredentialStart, localAdmin, access.AllTenants, now, 0)
	host, err := os.Hostname()
	if err != nil {
		host = "this host"
	}
	// Hosts and directories that serve from one database have one each.
	cred.Name = text.Clean(host+":"+s.data.file(AdminFile), 200)
	// The file appears last: a crash before that leaves a token that nobody
	// has and no file, and the next start replaces both.
	tmp, err := renameio.NewPendingFile(name, renameio.WithPermissions(0o600))
	if err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	defer tmp.Cleanup() //nolint:errcheck // after the replacement there is nothing to clean up
	b, err := yaml.Marshal(AdminConfig{Server: s.operatorsURL, CA: string(s.ca.RootsPEM()), Token: token})
	if err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	if _, err := tmp.Write(append([]byte("# Full access to this muster centre. Keep it secret; it is written once.\n"), b...)); err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	err = s.store.Update(ctx, func(t store.Tx) error {
		old, err := t.CredentialsOf(localAdmin, store.CredentialStart, maxCredentials)
		if err != nil {
			return err
		}
		for _, o := range old {
			// Those of other hosts that serve from the same database stay.
			if o.Name == cred.Name || o.Name == tokenFromBefore {
				if err := t.RevokeCredential(o.ID, now); err != nil {
					return err
				}
			}
		}
		if _, err := grant(t, by, store.Binding{Binding: access.Binding{Tenant: access.AllTenants, Role: access.Admin}, Subject: userSubject(localAdmin)}, "administrator of the host"); err != nil {
			return err
		}
		if err := t.AddCredential(cred); err != nil {
			return err
		}
		return by.record(t, DefaultTenant, audit.TokenCreated, "token/"+cred.ID, nil, map[string]string{"user": localAdmin, "kind": string(cred.Kind)}, "written to "+AdminFile)
	})
	if err != nil {
		return fmt.Errorf("central: make administrator: %w", err)
	}
	if err := tmp.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	return nil
}

// tokenFromBefore is the name that the migration gave to tokens of before
// there were credentials.
const tokenFromBefore = "from before"

// renewAdmin keeps the address in admin.yaml right when the port changes.
func (s *Server) renewAdmin(name string, operators net.Addr) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return fmt.Errorf("central: read %s: %w", AdminFile, err)
	}
	var c AdminConfig
	if err := yaml.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("central: read %s: %w", AdminFile, err)
	}
	url, ca := s.operatorURL(operators), string(s.ca.RootsPEM())
	if c.Server == url && c.CA == ca {
		return nil
	}
	c.Server, c.CA = url, ca
	if b, err = yaml.Marshal(c); err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	if err := renameio.WriteFile(name, append([]byte("# Full access to this muster centre. Keep it secret; it is written once.\n"), b...), 0o600); err != nil {
		return fmt.Errorf("central: write %s: %w", AdminFile, err)
	}
	return nil
}

// operatorURL is how the host itself reaches the operator endpoint.
func (s *Server) operatorURL(a net.Addr) string {
	host, port, err := net.SplitHostPort(a.String())
	if ip := net.ParseIP(host); err != nil || ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "https://" + net.JoinHostPort(host, port)
}

// ensureTenant makes the default tenant.
func ensureTenant(ctx context.Context, s store.Store, by act) error {
	return s.Update(ctx, func(t store.Tx) error {
		_, err := t.Tenant(DefaultTenant)
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		tenant := fleet.Tenant{Meta: fleet.Meta{Tenant: DefaultTenant, Name: DefaultTenant, Generation: 1, Created: by.now, Updated: by.now}}
		if err := tenant.Validate(); err != nil {
			return fmt.Errorf("central: make tenant: %w", err)
		}
		if tenant, err = t.PutTenant(tenant); err != nil {
			return err
		}
		return by.record(t, tenant.Name, audit.TenantCreated, "tenant/"+tenant.Name, nil, tenant, "first start")
	})
}
