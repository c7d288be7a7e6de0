package central

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/central/store/backup"
	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
)

// filled is a data directory with something in it, on either engine.
func filled(t *testing.T, database string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if database != "" {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, DatabaseFile), []byte(database), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	h.scribe = &h.s.scribe
	for i := range 20 {
		r, err := h.File(context.Background(), servicetest.Filing(fmt.Sprint("m", i)))
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := h.Approve(r.ID, r.Revision); err != nil {
				t.Fatal(err)
			}
			if _, err := h.issueNow(r.ID, fmt.Sprintf("0a%02d", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := h.s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func taken(t *testing.T, dir string, keys bool) []byte {
	t.Helper()
	var b bytes.Buffer
	s, err := Backup(context.Background(), dir, &b, keys, "test", servicetest.Start)
	if err != nil {
		t.Fatal(err)
	}
	if s.Rows < 100 || s.Tables < 20 || s.Keys != keys || s.Epoch == 0 {
		t.Fatalf("%+v", s)
	}
	return b.Bytes()
}

// content is what a backup says of the rows, in an order of its own.
func content(t *testing.T, b []byte) string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(all), "\n")
	var tables []string
	table := ""
	for _, l := range lines {
		switch {
		case strings.HasPrefix(l, `{"table"`):
			table, _, _ = strings.Cut(l, `","`)
		case strings.HasPrefix(l, "["):
			tables = append(tables, table+l)
		}
	}
	slices.Sort(tables)
	// What a restore changes: the epoch and the record that says so, and what
	// ties a shared database to its keys.
	out := regexp.MustCompile(`(?m)^.*(\["epoch",|\\"centre\.restored\\"|"(leader-term|authority-sha256|seal-key-sha256)").*$`).ReplaceAllString(strings.Join(tables, "\n"), "")
	return strings.ReplaceAll(out, "\n\n", "\n")
}

func restored(t *testing.T, b []byte, database string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "restored")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if database != "" {
		if err := os.WriteFile(filepath.Join(dir, DatabaseFile), []byte(database), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, epoch, err := Restore(context.Background(), dir, file(t, b), "test", servicetest.Start)
	if err != nil {
		t.Fatal(err)
	}
	if epoch < 2 {
		t.Errorf("epoch %d after a restore", epoch)
	}
	return dir
}

func file(t *testing.T, b []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestBackup: from either engine to either, with keys, and everything is there.
func TestBackup(t *testing.T) {
	lite, pg := filled(t, ""), filled(t, pgtest.URL(t))
	for name, dir := range map[string]string{"sqlite": lite, "postgres": pg} {
		whole := taken(t, dir, true)
		for into, url := range map[string]string{"sqlite": "", "postgres": pgtest.URL(t)} {
			t.Run(name+" to "+into, func(t *testing.T) {
				got := restored(t, whole, url)
				if was, is := content(t, whole), content(t, taken(t, got, false)); was != is {
					t.Errorf("other rows than before: %d and %d bytes", len(was), len(is))
				}
				h, err := openHarness(got, newClock())
				if err != nil {
					t.Fatal(err)
				}
				defer h.s.Close()
				h.sound(t)
				if _, err := h.File(context.Background(), servicetest.Filing("new")); err != nil {
					t.Error(err)
				}
			})
		}
	}
	if b := taken(t, lite, false); bytes.Contains(unzipped(t, b), []byte("PRIVATE KEY")) || bytes.Contains(unzipped(t, b), []byte(`"file"`)) {
		t.Error("a backup without keys holds keys")
	}
}

func unzipped(t *testing.T, b []byte) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestBackupWhileServing: the centre writes all the time; the backup is one
// moment.
func TestBackupWhileServing(t *testing.T) {
	for name, url := range map[string]string{"sqlite": "", "postgres": pgtest.URL(t)} {
		t.Run(name, func(t *testing.T) {
			dir := filled(t, url)
			h, err := openHarness(dir, newClock())
			if err != nil {
				t.Fatal(err)
			}
			defer h.s.Close()
			stop, done := make(chan struct{}), make(chan error)
			go func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					if _, err := h.File(context.Background(), servicetest.Filing(fmt.Sprint("w", i))); err != nil {
						done <- err
						return
					}
				}
			}()
			for range 5 {
				b := taken(t, dir, true)
				g, err := openHarness(restored(t, b, ""), newClock())
				if err != nil {
					t.Fatal(err)
				}
				g.sound(t)
				requests, err := g.Requests()
				if err != nil {
					t.Fatal(err)
				}
				records, err := g.records()
				if err != nil {
					t.Fatal(err)
				}
				filed := 0
				for _, r := range records {
					if r.Kind == fleet.AuditKind("request.filed") {
						filed++
					}
				}
				if filed != len(requests) {
					t.Errorf("%d requests, %d records of filing: not one moment", len(requests), filed)
				}
				if err := g.s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			close(stop)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestBackupDamaged: what is cut off, changed or none of ours is refused, and
// nothing was written.
func TestBackupDamaged(t *testing.T) {
	dir := filled(t, "")
	whole := taken(t, dir, true)
	try := func(what string, b []byte, want error) {
		t.Helper()
		into := t.TempDir()
		_, _, err := Restore(context.Background(), into, file(t, b), "test", servicetest.Start)
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		if _, err := os.Stat(filepath.Join(into, databaseFile)); err == nil {
			t.Errorf("%s: a database was made", what)
		}
	}
	for range 60 {
		n := rand.IntN(len(whole))
		try(fmt.Sprintf("cut off at %d of %d", n, len(whole)), whole[:n], backup.ErrDamaged)
		b := bytes.Clone(whole)
		i := 10 + rand.IntN(len(b)-10) // the head of gzip holds a time that nobody reads
		b[i] ^= 1 << rand.IntN(8)
		try(fmt.Sprintf("a bit changed at %d of %d", i, len(whole)), b, backup.ErrDamaged)
	}
	try("nothing", nil, backup.ErrDamaged)
	try("something else", []byte("PK\x03\x04 this is a zip"), backup.ErrDamaged)
	plain := unzipped(t, whole)
	again := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		z.Write(b)
		z.Close()
		return out.Bytes()
	}
	try("a row left out", again(bytes.Replace(plain, []byte("\n["), []byte("\nx["), 1)), backup.ErrDamaged)
	lines := bytes.SplitAfter(plain, []byte("\n"))
	try("the last row left out", again(bytes.Join(append(lines[:len(lines)/2:len(lines)/2], lines[len(lines)/2+1:]...), nil)), backup.ErrDamaged)
	try("a path that leads out", again(bytes.Replace(plain, []byte(`{"file":"seal.key"`), []byte(`{"file":"../seal.key"`), 1)), backup.ErrDamaged)
	try("followed by more", append(bytes.Clone(whole), whole...), backup.ErrDamaged)
	if _, _, err := Restore(context.Background(), t.TempDir(), file(t, again(bytes.Replace(plain, []byte(backup.Format), []byte("muster backup 9"), 1))), "test", servicetest.Start); err == nil || !strings.Contains(err.Error(), "newer") {
		t.Errorf("a newer format: %v", err)
	}
	// Over something that is there.
	if _, _, err := Restore(context.Background(), dir, file(t, taken(t, dir, false)), "test", servicetest.Start); !errors.Is(err, backup.ErrNotEmpty) {
		t.Errorf("over a database: %v", err)
	}
	if _, _, err := Restore(context.Background(), dir, file(t, whole), "test", servicetest.Start); err == nil || !strings.Contains(err.Error(), "keys") {
		t.Errorf("over keys: %v", err)
	}
	url := pgtest.URL(t)
	filled(t, url)
	into := t.TempDir()
	if err := os.WriteFile(filepath.Join(into, DatabaseFile), []byte(url), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Restore(context.Background(), into, file(t, whole), "test", servicetest.Start); !errors.Is(err, backup.ErrNotEmpty) {
		t.Errorf("over a PostgreSQL database: %v", err)
	}
}

// TestCopyDatabase: a centre moves to PostgreSQL with all it has and goes on.
func TestCopyDatabase(t *testing.T) {
	dir := filled(t, "")
	was := content(t, taken(t, dir, false))
	url := pgtest.URL(t)
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CopyDatabase(context.Background(), dir, url, "test", servicetest.Start); !errors.Is(err, ErrRunning) {
		t.Errorf("while the centre runs: %v", err)
	}
	if err := h.s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := CopyDatabase(context.Background(), dir, url, "test", servicetest.Start); err != nil {
		t.Fatal(err)
	}
	if is := content(t, taken(t, dir, false)); was != is {
		t.Errorf("other rows than before: %d and %d bytes", len(was), len(is))
	}
	if _, err := os.Stat(filepath.Join(dir, databaseFile)); err == nil {
		t.Error("the old database still has its name")
	}
	if h, err = openHarness(dir, newClock()); err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	h.sound(t)
	if h.s.epoch != 1 {
		t.Errorf("epoch %d: nothing was lost, so the life of the database goes on", h.s.epoch)
	}
	if _, err := CopyDatabase(context.Background(), filled(t, ""), url, "test", servicetest.Start); !errors.Is(err, backup.ErrNotEmpty) {
		t.Errorf("into a database in use: %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	f.Add([]byte("x"))
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write([]byte(`{"format":"muster backup 1"}` + "\n" + `{"table":"settings","columns":["name","value"]}` + "\n" + `["a","b"]` + "\n" + `{"end":true,"rows":1,"sha256":""}` + "\n"))
	z.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 1<<16 {
			_, _ = backup.Verify(bytes.NewReader(b))
		}
	})
}
