package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/central/store/storetest"
	"github.com/muster-edge/muster/fleet/audit"
)

// cable is a way to the server that breaks at the worst moments: around the
// message that commits.
type cable struct {
	server string
	dir    string
	// cut decides, each time a commit passes, what happens to it.
	cut  func() cut
	cuts [3]atomic.Int64
}

type cut int

const (
	whole  cut = iota
	before     // the server never sees the commit
	after      // the server commits, nobody hears the answer
)

func newCable(t *testing.T, server string, decide func() cut) *cable {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgc")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{server: server, dir: dir, cut: decide}
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); os.RemoveAll(dir) })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go c.join(client)
		}
	}()
	return c
}

func (c *cable) join(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("unix", c.server)
	if err != nil {
		return
	}
	defer server.Close()
	var deaf atomic.Bool
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			if n > 0 && !deaf.Load() {
				if _, err := client.Write(b[:n]); err != nil {
					break
				}
			}
			if err != nil {
				break
			}
		}
		client.Close()
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if n > 0 {
			what := whole
			if bytes.Contains(b[:n], []byte("commit\x00")) {
				what = c.cut()
				c.cuts[what].Add(1)
			}
			switch what {
			case before:
				return
			case after:
				deaf.Store(true)
				if _, err := server.Write(b[:n]); err != nil {
					return
				}
				client.Close()
				_, _ = io.ReadAll(server) // until it is done and ends: we say nothing more
				return
			}
			if _, err := server.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// TestCommitLost: the connection is cut around the commit, before and after
// the server has seen it. Every act is there once, and acknowledged.
func TestCommitLost(t *testing.T) {
	server := pgtest.Shared(t)
	url := pgtest.URL(t)
	direct, err := Open(context.Background(), Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	tenants(t, direct)
	var n atomic.Int64
	c := newCable(t, server.Socket(), func() cut { return [...]cut{whole, before, after, after, before}[n.Add(1)%5] })
	s, err := Open(context.Background(), Config{URL: strings.Replace(url, "host="+filepath.Dir(server.Socket()), "host="+c.dir, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const acts = 30
	for i := range acts {
		if err := s.Update(context.Background(), act(i)); err != nil {
			t.Errorf("act %d: %v", i, err)
		}
	}
	counted(t, direct, acts)
	if c.cuts[before].Load() < 5 || c.cuts[after].Load() < 5 {
		t.Errorf("the cable was cut %d times before and %d times after a commit: that proves little", c.cuts[before].Load(), c.cuts[after].Load())
	}
}

// TestCommitUnknown: when the database does not come back to say what became
// of a commit, the act is not acknowledged, and not run again.
func TestCommitUnknown(t *testing.T) {
	server := pgtest.Shared(t)
	url := pgtest.URL(t)
	direct, err := Open(context.Background(), Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	tenants(t, direct)
	var cutting atomic.Bool
	c := newCable(t, server.Socket(), func() cut {
		if cutting.Load() {
			return after
		}
		return whole
	})
	s, err := Open(context.Background(), Config{URL: strings.Replace(url, "host="+filepath.Dir(server.Socket()), "host="+c.dir, 1), Patience: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.writer.SetMaxOpenConns(1) // an idle second one would reach the server
	cutting.Store(true)
	runs := 0
	err = s.Update(context.Background(), func(tx store.Tx) error {
		runs++
		// From here on nobody reaches the server anew.
		if err := os.Remove(filepath.Join(c.dir, ".s.PGSQL.5432")); err != nil {
			return err
		}
		return act(0)(tx)
	})
	if !errors.Is(err, store.ErrUnknown) || runs != 1 {
		t.Errorf("got %v after %d runs, want ErrUnknown after 1", err, runs)
	}
	counted(t, direct, 1) // this time it was committed, which nobody could know
}

// TestServerCrashes: the server is killed again and again while many write.
// What was acknowledged is there, nothing is there twice.
func TestServerCrashes(t *testing.T) {
	server, err := pgtest.Start()
	if errors.Is(err, pgtest.ErrNone) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	}()
	url, err := server.Database(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var stores []*Store
	for range 2 {
		s, err := Open(context.Background(), Config{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		stores = append(stores, s)
	}
	tenants(t, stores[0])
	const acts, writers = 120, 6
	var next, done atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= acts {
					return
				}
				if err := stores[w%2].Update(context.Background(), act(i)); err != nil {
					t.Errorf("act %d: %v", i, err)
				}
				done.Add(1)
			}
		})
	}
	crashes := 0
	for mark := int64(acts / 4); mark < acts; mark += acts / 4 {
		for done.Load() < mark && done.Load() < acts {
			time.Sleep(time.Millisecond)
		}
		server.Crash()
		crashes++
		if err := server.Up(); err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	counted(t, stores[0], acts)
	if crashes < 3 {
		t.Errorf("%d crashes", crashes)
	}
}

func tenants(t *testing.T, s store.Store) {
	t.Helper()
	if err := s.Update(context.Background(), func(tx store.Tx) error { _, err := tx.PutTenant(storetest.Tenant("one")); return err }); err != nil {
		t.Fatal(err)
	}
}

// act adds a site, which fails if it is there, and a record.
func act(i int) func(store.Tx) error {
	return func(tx store.Tx) error {
		if _, err := tx.PutSite(storetest.Site("one", fmt.Sprintf("s%08d", i))); err != nil {
			return err
		}
		_, err := tx.AddAudit(storetest.Record("one", fmt.Sprint(i)))
		return err
	}
}

// counted fails unless there are so many sites and records, each once.
func counted(t *testing.T, s store.Store, want int) {
	t.Helper()
	err := s.View(context.Background(), func(r store.Reader) error {
		sites, err := r.Sites("one", "", 1<<20)
		if err != nil {
			return err
		}
		records, err := r.Audit("one", 0, 1<<20)
		if err != nil {
			return err
		}
		if len(sites) != want || len(records) != want {
			t.Errorf("%d sites and %d records, want %d of each", len(sites), len(records), want)
		}
		return audit.Verify(records)
	})
	if err != nil {
		t.Error(err)
	}
}
