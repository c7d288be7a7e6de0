package postgres

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/central/store/storetest"
	"github.com/muster-edge/muster/central/store/tables"
	"github.com/muster-edge/muster/fleet"
)

func two(t *testing.T) (a, b *Store) {
	t.Helper()
	url := pgtest.URL(t)
	for _, s := range []**Store{&a, &b} {
		var err error
		if *s, err = Open(context.Background(), Config{URL: url}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*s).Close() })
	}
	tenants(t, a)
	return a, b
}

// TestChanges: what one process commits, the other hears of, in that order,
// and nothing of what was rolled back.
func TestChanges(t *testing.T) {
	a, b := two(t)
	ctx := context.Background()
	from, err := b.LastChange(ctx)
	if err != nil || from == 0 {
		t.Fatal(from, err)
	}
	boom := errors.New("no")
	for i, f := range []func(store.Tx) error{
		func(tx store.Tx) error {
			_, err := tx.PutSite(storetest.Site("one", "a"))
			return err
		},
		func(tx store.Tx) error {
			_, err := tx.PutSite(storetest.Site("one", "lost"))
			return errors.Join(err, boom)
		},
		func(tx store.Tx) error {
			if err := tx.AddRequest(storetest.Request("one", "x", "1")); err != nil {
				return err
			}
			_, err := tx.AddEvent(fleet.Event{Tenant: "one"})
			return err
		},
	} {
		if err := a.Update(ctx, f); err != nil && !errors.Is(err, boom) {
			t.Fatal(i, err)
		}
	}
	c, err := b.Changes(ctx, from)
	if err != nil {
		t.Fatal(err)
	}
	r := storetest.Request("one", "x", "1")
	want := []store.Change{{Kind: store.ChangedSite, Tenant: "one", Key: "a"}, {Kind: store.ChangedRequest, Tenant: "one", Key: string(r.ID)}, {Kind: store.ChangedEvents, Tenant: "one"}}
	if len(c.All) != len(want) || c.Last != from+2 || c.Epoch != 1 || c.More {
		t.Fatalf("got %+v, want %+v", c, want)
	}
	for i := range want {
		if c.All[i] != want[i] {
			t.Errorf("change %d is %+v, want %+v", i, c.All[i], want[i])
		}
	}
	if c, err := b.Changes(ctx, c.Last); err != nil || len(c.All) != 0 {
		t.Errorf("nothing is new, but: %+v %v", c, err)
	}
	if _, err := b.Changes(ctx, c.Last+5); !errors.Is(err, store.ErrForgotten) {
		t.Errorf("a number from the future: %v, want ErrForgotten", err)
	}
	if _, err := a.writer.Exec("DELETE FROM changes WHERE seq <= $1", int64(from+1)); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Changes(ctx, from); !errors.Is(err, store.ErrForgotten) {
		t.Errorf("dropped changes: %v, want ErrForgotten", err)
	}
}

// TestLead: one leads. When its connection goes, its writes are refused, also
// while it does not know yet, and the other leads.
func TestLead(t *testing.T) {
	a, b := two(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	leading := make(chan context.Context, 1)
	hold := make(chan struct{})
	ended := make(chan error, 2)
	first := true
	go func() {
		ended <- a.Lead(ctx, func(ctx context.Context) error {
			if !first {
				<-ctx.Done()
				return nil
			}
			first = false
			leading <- ctx
			<-hold // does not look at its context: a process that hangs
			return nil
		})
	}()
	old := <-leading
	if err := a.Update(old, act(0)); err != nil {
		t.Fatal(err)
	}
	second := make(chan context.Context, 1)
	go func() {
		ended <- b.Lead(ctx, func(ctx context.Context) error {
			second <- ctx
			<-ctx.Done()
			return nil
		})
	}()
	if n, err := a.writer.Exec(`SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = $1 AND classid = $2`,
		int64(lockLeader&0xffffffff), int64(lockLeader>>32)); err != nil {
		t.Fatal(n, err)
	}
	now := <-second
	if err := b.Update(now, act(1)); err != nil {
		t.Errorf("the new leader: %v", err)
	}
	if err := a.Update(context.WithoutCancel(old), act(2)); !errors.Is(err, store.ErrNotLeader) {
		t.Errorf("the old leader wrote: %v", err)
	}
	if err := a.Update(context.Background(), act(2)); err != nil {
		t.Errorf("what is no leader's work: %v", err)
	}
	<-old.Done()
	close(hold)
	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	counted(t, b, 3)
}

// TestMigrationsOutOfOrder: a number that was left free is filled later.
func TestMigrationsOutOfOrder(t *testing.T) {
	ctx := context.Background()
	some, all := fstest.MapFS{}, fstest.MapFS{}
	names, err := fs.Glob(tables.Files(), "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := fs.ReadFile(tables.Files(), n)
		if err != nil {
			t.Fatal(err)
		}
		all[n] = &fstest.MapFile{Data: b}
		if !strings.HasPrefix(n, "00002") {
			some[n] = all[n]
		}
	}
	if len(some) != len(all)-1 {
		t.Fatal("the second migration has another name")
	}
	s := &Store{}
	if s.config, err = parse(pgtest.URL(t)); err != nil {
		t.Fatal(err)
	}
	d, err := pgtest.Open(pgtest.URL(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, f := range []fs.FS{some, all, all} {
		if err := tables.Migrate(ctx, d, goose.DialectPostgres, files{f}); err != nil {
			t.Fatal(err)
		}
	}
	var n int
	if err := d.QueryRow("SELECT COUNT(*) FROM preapproval_uses").Scan(&n); err != nil {
		t.Errorf("what %s makes is not there: %v", path.Base("00002"), err)
	}
}

// TestURL: an error about the database's URL never shows its password.
func TestURL(t *testing.T) {
	for _, bad := range []string{
		"postgres://muster:geheim@host:notaport/db", "postgres://muster:geheim@host/db?sslmode=maybe",
		"postgres://muster:geheim@%zz/db", "host=h password=geheim sslmode=maybe", "geheim",
	} {
		_, err := Open(context.Background(), Config{URL: bad})
		if err == nil || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	// Nobody there: a plain error, soon.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Open(ctx, Config{URL: "postgres://muster:geheim@127.0.0.1:1/db"}); err == nil || strings.Contains(err.Error(), "geheim") {
		t.Error(err)
	}
}
