package postgres

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/central/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// places remembers which database belongs to a place of the suite.
var places sync.Map

func open(t testing.TB, place string) store.Store {
	t.Helper()
	url, there := places.Load(place)
	if !there {
		url = pgtest.URL(t)
		places.Store(place, url)
	}
	s, err := Open(context.Background(), Config{URL: url.(string), MaxEvents: storetest.Ring})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) { storetest.Run(t, open) }

// TestStatements: every statement of package tables is one that PostgreSQL
// understands, whether a test above runs it or not.
func TestStatements(t *testing.T) {
	s := open(t, t.TempDir()).(*Store)
	defer s.Close()
	files, err := filepath.Glob("../tables/db/*.sql.go")
	if err != nil || len(files) == 0 {
		t.Fatal("no statements found", err)
	}
	n := 0
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), "= `-- name: ")[1:] {
			text, _, _ := strings.Cut(part, "`")
			label, text, _ := strings.Cut(text, "\n")
			n++
			p, err := s.reader.Prepare(dollars(text))
			if err != nil {
				t.Errorf("%s: %v", label, err)
				continue
			}
			p.Close()
		}
	}
	if n < 80 {
		t.Errorf("only %d statements were found", n)
	}
}

// TestOrder: every text column is compared byte by byte, also in a database
// that sorts by other rules.
func TestOrder(t *testing.T) {
	s := open(t, t.TempDir()).(*Store)
	defer s.Close()
	var byBytes bool
	if err := s.reader.QueryRow(`SELECT 'a' < 'B'`).Scan(&byBytes); err != nil || !byBytes {
		t.Fatalf("the test's server sorts by bytes: this test would prove nothing (%v)", err)
	}
	rows, err := s.reader.Query(`SELECT table_name || '.' || column_name, data_type, COALESCE(collation_name, '') FROM information_schema.columns
		WHERE table_schema = 'public' AND table_name <> 'goose_db_version'`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	n := 0
	for rows.Next() {
		var column, kind, collation string
		if err := rows.Scan(&column, &kind, &collation); err != nil {
			t.Fatal(err)
		}
		n++
		if kind != "bigint" && (kind != "text" || collation != "C") {
			t.Errorf("%s is %s with collation %q", column, kind, collation)
		}
	}
	if err := rows.Err(); err != nil || n < 50 {
		t.Errorf("%d columns, %v", n, err)
	}
}
