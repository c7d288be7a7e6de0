package sqlite

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"io/fs"
	"path/filepath"
	"testing"
	"testing/fstest"

	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// TestTokensOfBeforeGoOn: who had a token before there were credentials has it
// still, with the role it had.
func TestTokensOfBeforeGoOn(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "muster.db")
	before := fstest.MapFS{}
	for _, name := range []string{"00001_first.sql", "00002_preapprovals.sql", "00003_clusters.sql"} {
		b, err := fs.ReadFile(tables.Files(), name)
		if err != nil {
			t.Fatal(err)
		}
		before[name] = &fstest.MapFile{Data: b}
	}
	d, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := tables.Migrate(ctx, d, goose.DialectSQLite3, before); err != nil {
		t.Fatal(err)
	}
	hash := func(s string) fleet.Digest { return sha256.Sum256([]byte(s)) }
	for _, q := range []string{
		`INSERT INTO tenants (name, lab, revision, body) VALUES ('default', 0, 1, '{"tenant":"default","name":"default"}')`,
		`INSERT INTO operators (tenant, name, role, token, created) VALUES ('default', 'admin', 'admin', '` + hash("a").String() + `', 7)`,
		`INSERT INTO operators (tenant, name, role, token, created) VALUES ('default', 'eve', 'viewer', '` + hash("e").String() + `', 7)`,
	} {
		if _, err := d.ExecContext(ctx, q); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := Open(ctx, Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	err = s.View(ctx, func(r store.Reader) error {
		for token, want := range map[string]struct {
			holder string
			kind   store.CredentialKind
			role   access.Binding
		}{
			"a": {"admin", store.CredentialStart, access.Binding{Tenant: access.AllTenants, Role: access.Admin}},
			"e": {"eve", store.CredentialPersonal, access.Binding{Tenant: "default", Role: access.Viewer}},
		} {
			c, err := r.CredentialByHash(hash(token))
			if err != nil {
				return err
			}
			roles, err := r.BindingsOf("user:" + want.holder)
			if err != nil {
				return err
			}
			if c.Holder != want.holder || c.Kind != want.kind || c.Tenant != "default" || len(roles) != 1 || roles[0].Binding.String() != want.role.String() {
				t.Errorf("%s: %+v with %+v", want.holder, c, roles)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
