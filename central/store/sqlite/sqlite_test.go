package sqlite

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pressly/goose/v3"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/storetest"
	"github.com/muster-edge/muster/central/store/tables"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// crashDir, in the environment, makes this test binary the process that is
// killed.
const crashDir = "MUSTER_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := writeForEver(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func open(t testing.TB, dir string) store.Store {
	t.Helper()
	s, err := Open(context.Background(), Config{Path: filepath.Join(dir, "test.db"), MaxEvents: storetest.Ring})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) { storetest.Run(t, open) }

// writeForEver writes one site and one record per transaction and prints its
// number once it is acknowledged.
func writeForEver(dir string) error {
	s, err := Open(context.Background(), Config{Path: filepath.Join(dir, "test.db")})
	if err != nil {
		return err
	}
	for {
		n := 0
		err := s.Update(context.Background(), func(t store.Tx) error {
			sites, err := t.Sites("one", "", 1<<30)
			if err != nil {
				return err
			}
			n = len(sites)
			if _, err := t.PutSite(storetest.Site("one", fmt.Sprintf("s%08d", n))); err != nil {
				return err
			}
			_, err = t.AddAudit(storetest.Record("one", fmt.Sprint(n)))
			return err
		})
		if err != nil {
			return err
		}
		fmt.Println(n)
	}
}

// TestKilled: whatever was acknowledged before SIGKILL is there, nothing is
// there by half, and the chain holds.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.Update(context.Background(), func(tx store.Tx) error { _, err := tx.PutTenant(storetest.Tenant("one")); return err }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	total := 0
	for round := range 12 {
		acknowledged := killAfter(t, dir, 1+rand.IntN(25))
		s := open(t, dir)
		err := s.View(context.Background(), func(tx store.Reader) error {
			sites, err := tx.Sites("one", "", 1<<30)
			if err != nil {
				return err
			}
			records, err := tx.Audit("one", 0, 1<<30)
			if err != nil {
				return err
			}
			if len(sites) <= acknowledged {
				t.Errorf("round %d: %d was acknowledged, but there are %d sites", round, acknowledged, len(sites))
			}
			if len(sites) > acknowledged+2 {
				t.Errorf("round %d: %d sites, but only %d acknowledged", round, len(sites), acknowledged)
			}
			if len(sites) != len(records) {
				t.Errorf("round %d: %d sites and %d records", round, len(sites), len(records))
			}
			total = len(sites)
			return audit.Verify(records)
		})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if total < 12 {
		t.Errorf("only %d transactions were tried", total)
	}
}

// killAfter runs the writer until it has acknowledged so many transactions,
// kills it, and returns the last number it printed.
func killAfter(t *testing.T, dir string, lines int) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	last := -1
	for scan := bufio.NewScanner(out); scan.Scan(); {
		if _, err := fmt.Sscan(scan.Text(), &last); err != nil {
			t.Fatalf("the writer said %q", scan.Text())
		}
		if lines--; lines == 0 {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the writer ended by itself: %v", err)
	}
	return last
}

func TestFileIsPrivate(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	for _, name := range []string{"test.db", "test.db-wal"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o", name, info.Mode().Perm())
		}
	}
}

// TestPragmas: what makes an acknowledged commit durable is set on the
// connection that writes.
func TestPragmas(t *testing.T) {
	s := open(t, t.TempDir()).(*Store)
	defer s.Close()
	for _, c := range []struct {
		db         *sql.DB
		name, want string
	}{
		{s.writer, "journal_mode", "wal"}, {s.writer, "synchronous", "2"},
		{s.writer, "foreign_keys", "1"}, {s.reader, "query_only", "1"},
	} {
		var got string
		if err := c.db.QueryRow("PRAGMA " + c.name).Scan(&got); err != nil || got != c.want {
			t.Errorf("%s is %q, want %q (%v)", c.name, got, c.want, err)
		}
	}
	if s.writer.Stats().MaxOpenConnections != 1 {
		t.Error("there must be one writer")
	}
}

// TestUpgradeOfTheFirstSchema: a database that the first version wrote, with
// rows in it, is brought up to date and says the same as before.
func TestUpgradeOfTheFirstSchema(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "test.db")
	old, err := sql.Open("sqlite", dsn(path, "immediate", "journal_mode(WAL)"))
	if err != nil {
		t.Fatal(err)
	}
	files := tables.Files()
	p, err := goose.NewProvider(goose.DialectSQLite3, old, files, goose.WithVerbose(false))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	node, gone := storetest.Node("one", "a"), storetest.Node("one", "b")
	node.Site = "shop"
	rows := []string{
		`INSERT INTO settings VALUES ('epoch', '1'), ('document-version', '7')`,
		`INSERT INTO tenants VALUES ('one', 1, 1, '{"tenant":"one","name":"one"}')`,
		`INSERT INTO sites VALUES ('one', 'shop', 3, '{"tenant":"one","name":"shop","spec":{}}')`,
		`INSERT INTO preapprovals VALUES ('one', 'list', 1, '{}')`,
		`INSERT INTO listed_eks VALUES ('one', 'ab', 'list')`,
	}
	for _, n := range []fleet.Node{node, gone} {
		body, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, fmt.Sprintf(`INSERT INTO nodes VALUES ('one', '%s', 'w', 'active', '%s', '%s', '%s', 2, 5, '%s')`, n.ID, n.Site, n.EK, n.LDevIDKey, body),
			fmt.Sprintf(`INSERT INTO documents VALUES ('one', 'admission', '%s', 1, %d, 9, 'envelope of %s')`, n.ID, len(rows), n.Site))
	}
	for _, r := range rows {
		if _, err := old.Exec(r); err != nil {
			t.Fatalf("%s: %v", r, err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time there is nothing to do
		s := open(t, dir)
		err := s.View(context.Background(), func(r store.Reader) error {
			site, err := r.Site("one", "shop")
			if err != nil || site.Revision != 3 || site.Ledger.Unsure(1) {
				t.Errorf("the site: %+v %v", site, err)
			}
			n, err := r.Node("one", node.ID)
			if err != nil || n.Site != "shop" || n.Revision != 2 {
				t.Errorf("the node: %+v %v", n, err)
			}
			documents, err := r.DocumentsOfSite("one", "shop", fleet.DocVersion{}, 10)
			if err != nil || len(documents) != 1 || documents[0].Name != string(node.ID) || string(documents[0].Envelope) != "envelope of shop" {
				t.Errorf("the site's documents: %+v %v", documents, err)
			}
			if d, err := r.Document("one", "admission", string(gone.ID)); err != nil || d.Site != "" {
				t.Errorf("the document of a node in the pool: %+v %v", d, err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Update(context.Background(), func(tx store.Tx) error {
			v, err := tx.NextVersion()
			if v.N < 8 {
				t.Errorf("version %s was given out before", v)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPlans: what is asked for each machine that files, and by people who look
// at a long queue, goes by an index. A plan that reads every request of the
// tenant looks the same in tests with ten of them.
func TestPlans(t *testing.T) {
	s := open(t, t.TempDir()).(*Store)
	defer s.Close()
	files, err := filepath.Glob("../tables/db/*.sql.go")
	if err != nil {
		t.Fatal(err)
	}
	statements := make(map[string]string)
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), "= `-- name: ")[1:] {
			text, _, _ := strings.Cut(part, "`")
			label, text, _ := strings.Cut(text, "\n")
			statements[strings.Fields(label)[0]] = text
		}
	}
	for name, want := range map[string][]string{
		"ListLookAlikes":           {"requests_by_serial (tenant=? AND serial=?)", "requests_by_uuid (tenant=? AND uuid=?)"},
		"CountUnverified":          {"requests_by_trust (tenant=? AND state=? AND identity=?)"},
		"ListRequests":             {"requests_by_time (tenant=?)"},
		"ListRequestsBefore":       {"requests_by_time (tenant=? AND first_seen<?)"},
		"ListRequestsByState":      {"requests_by_state (tenant=? AND state=?)"},
		"ListRequestsByStateAfter": {"requests_by_state (tenant=? AND state=? AND first_seen>?)"},
		"FindRequests":             {"(tenant=? AND id>? AND id<?)", "requests_by_node (tenant=? AND node>? AND node<?)", "requests_by_words (tenant=? AND words>? AND words<?)"},
		"ListQueue":                {"requests_by_trust (tenant=? AND state=? AND identity=? AND first_seen>?)"},
		"CountQueue":               {"requests_by_trust (tenant=? AND state=?)"},
		"FindNodes":                {"nodes_by_words (tenant=? AND words>? AND words<?)"},
	} {
		text := statements[name]
		args := make([]any, strings.Count(text, "?"))
		for i := range args {
			args[i] = 1
		}
		rows, err := s.reader.Query("EXPLAIN QUERY PLAN "+text, args[:highest(text)]...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		plan := ""
		for rows.Next() {
			var id, parent, unused int
			var detail string
			if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
				t.Fatal(err)
			}
			plan += detail + "\n"
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			t.Fatal(err)
		}
		for _, w := range want {
			if !strings.Contains(plan, w) {
				t.Errorf("%s does not go by %s:\n%s", name, w, plan)
			}
		}
		if strings.HasPrefix(name, "List") && strings.Contains(plan, "TEMP B-TREE FOR ORDER BY") {
			t.Errorf("%s sorts what it read:\n%s", name, plan)
		}
	}
}

// highest is the greatest number of an argument in a statement.
func highest(text string) int {
	n := 0
	for i := range 20 {
		if strings.Contains(text, fmt.Sprintf("?%d", i)) {
			n = i
		}
	}
	return n
}
