package central

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/pki"
)

// Words and a beginning of an ID name a machine, not what it showed: they do
// not approve evidence that changed since somebody looked.
func TestWordsDoNotApproveChangedEvidence(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	f := servicetest.Filing("a")
	seen, err := h.File(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	f.Evidence.Serial = "another"
	changed, err := h.File(ctx, f)
	if err != nil || changed.ID == seen.ID || changed.Supersedes != seen.ID {
		t.Fatalf("%s after %s, %v", changed.ID, seen.ID, err)
	}
	approve := func(id string, revision int64) error {
		_, _, err := h.s.approve(ctx, testCaller, approval{id: id, revision: revision})
		return err
	}
	for name, id := range map[string]string{"words": seen.Words, "prefix": string(changed.ID[:10]), "the old ID": string(seen.ID)} {
		var refused *enroll.Refused
		if err := approve(id, 0); !errors.As(err, &refused) {
			t.Errorf("by %s: %v", name, err)
		}
	}
	if err := approve(string(changed.ID), changed.Revision); err != nil {
		t.Errorf("by the whole ID: %v", err)
	}
	// The twin: a machine that did not change is approved by its words.
	b, err := h.File(ctx, servicetest.Filing("b"))
	if err != nil {
		t.Fatal(err)
	}
	if err := approve(b.Words, 0); err != nil {
		t.Errorf("an unchanged machine by its words: %v", err)
	}
}

// The audit log says which EKs were denied, not which were named.
func TestDenialIsRecordedAsItIs(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	victim, err := h.File(ctx, servicetest.Filing("victim"))
	if err != nil {
		t.Fatal(err)
	}
	f := servicetest.Filing("thief")
	own := fleet.EKHash(sha256.Sum256([]byte("second EK of the thief")))
	f.Evidence.Aliases = []fleet.EKHash{victim.Evidence.EK, own}
	thief, err := h.File(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Deny(thief.Node); err != nil {
		t.Fatal(err)
	}
	records, err := h.records()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.Kind != audit.NodeDenied {
			continue
		}
		denied, spared, ok := strings.Cut(string(r.After), "not_denied")
		if !ok || strings.Contains(denied, victim.Evidence.EK.String()) == strings.Contains(spared, victim.Evidence.EK.String()) ||
			!strings.Contains(string(r.After), own.String()) {
			t.Errorf("the record says %s", r.After)
		}
		return
	}
	t.Error("there is no record")
}

// Keys made while a clock was years ahead do not seal for years.
func TestCookieKeysWhenTheClockWasAheadThenANewKey(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	seal := make([]byte, 32)
	rand.Read(seal)
	k, err := newCookieKeys(h.store, seal)
	if err != nil {
		t.Fatal(err)
	}
	ahead, err := k.current(ctx, servicetest.Start.AddDate(10, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	right, err := k.current(ctx, servicetest.Start)
	if err != nil || right[0] == ahead[0] || right[1] != ahead[0] {
		t.Errorf("%v after %v, %v", right, ahead, err)
	}
	if again, err := k.current(ctx, servicetest.Start.Add(time.Hour)); err != nil || again[0] != right[0] {
		t.Errorf("an hour later: another key, %v", err)
	}
}

// Strangers do not fill the disk of the centre with its log.
func TestRefusalsAreSaidInFewLines(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	r := newRefusals(slog.New(slog.NewTextHandler(&out, nil)), func() time.Time { return now })
	for range 100_000 {
		r.say("call refused")
	}
	if n := strings.Count(out.String(), "\n"); n != refusalBurst {
		t.Errorf("%d lines", n)
	}
	now = now.Add(time.Second)
	out.Reset()
	r.say("call refused", logAddress, "192.0.2.1")
	if !strings.Contains(out.String(), "unsaid=99900") || !strings.Contains(out.String(), "192.0.2.1") {
		t.Errorf("the next line is %q", out.String())
	}
	out.Reset()
	r.say("call refused")
	if strings.Contains(out.String(), "unsaid") {
		t.Errorf("counted twice: %q", out.String())
	}
}

// forgetful is a CA that cannot sign while down says so.
type forgetful struct {
	authority
	down func() bool
}

func (f forgetful) ServerCertificate([]string, time.Time) (tls.Certificate, error) {
	if f.down() {
		return tls.Certificate{}, errors.New("the clock says 1970, which is before the CA began")
	}
	return tls.Certificate{}, nil
}

// A clock that is wrong for some days does not end the centre; a CA that is
// gone for good is noticed while its last certificate is still good.
func TestCertificateIsRenewedWithPatience(t *testing.T) {
	for name, c := range map[string]struct {
		days int
		ends bool
	}{"a week": {7, false}, "again and again": {-1, false}, "for good": {1 << 20, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				day := func() int { return int(time.Since(start) / renewEvery) }
				ca := forgetful{down: func() bool { return day() > 0 && (day() <= c.days || c.days < 0 && day()%renewPatience != 0) }}
				cert, err := newServerCertificate(ca, []string{"centre"}, time.Now)
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 200*renewEvery)
				defer cancel()
				if err := cert.renew(ctx); (err != nil) != c.ends {
					t.Errorf("after %d days: %v", day(), err)
				}
				if c.ends && time.Since(start) > pki.ServerLifetime/2 {
					t.Errorf("noticed after %d days only", day())
				}
			})
		})
	}
}

// What machines and people type is data to the database.
func TestHostileTextIsDataToTheDatabase(t *testing.T) {
	h := newHarness(t, t.TempDir())
	ctx := context.Background()
	f := servicetest.Filing("a")
	evil := `'; DROP TABLE requests; --`
	f.Evidence.Serial, f.Evidence.UUID, f.Evidence.Board = evil, `" OR 1=1 --`, `%_\\`
	r, err := h.File(ctx, f)
	if err != nil {
		t.Fatal(err)
	}
	twin := servicetest.Filing("b")
	twin.Evidence.Serial = evil
	if r, err := h.File(ctx, twin); err != nil || len(r.Warnings) != 1 {
		t.Errorf("the same serial again: %q, %v", r.Warnings, err)
	}
	for _, id := range []string{"%", "_", "r-%", "r-' OR '1'='1", evil, "r-\x00", "*", "\xff", strings.Repeat("r", 1<<16)} {
		var none *errNoSuch
		if _, _, err := h.s.approve(ctx, testCaller, approval{id: id}); !errors.As(err, &none) {
			t.Errorf("approving %.20q: %v", id, err)
		}
	}
	if got, err := h.Request(ctx, DefaultTenant, r.ID); err != nil || got.Evidence.Serial != evil {
		t.Errorf("%q, %v", got.Evidence.Serial, err)
	}
	h.sound(t)
}

// The certificate of a node that ended is no certificate, although the node
// and its key are known.
func TestReportWithAnEndedCertificateIsRefused(t *testing.T) {
	var ahead atomic.Int64
	r := serve(t, t.TempDir(), func(c *Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	_, cert, issued := r.enroll(t, newMachine(t, "a"))
	left := time.Until(issued.NotAfter)
	ahead.Store(int64(left - time.Hour))
	if _, err := r.report(cert); err != nil {
		t.Errorf("an hour before it ends: %v", err)
	}
	ahead.Store(int64(left + time.Hour))
	if _, err := r.report(cert); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("an hour after it ended: %v", err)
	}
}

// Secrets on the disk are for their owner only, whatever the umask is.
func TestDataDirectoryIsPrivate(t *testing.T) {
	old := unix.Umask(0)
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "new")
	r := serve(t, dir, nil)
	defer r.stop() //nolint:errcheck // the clean-up looks at it
	for name, want := range map[string]fs.FileMode{"": 0o700, AdminFile: 0o600, sealKeyFile: 0o600, databaseFile: 0o600, lockFile: 0o600} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: %v, %v", name, info.Mode(), err)
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil && strings.HasSuffix(path, ".key") && info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// No root is trusted without a record of who brought it.
func TestRootsAreRecordedBeforeTheyAreTrusted(t *testing.T) {
	h := newHarness(t, t.TempDir())
	dir := h.s.data.file(rootsDir)
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	pem := h.s.ca.RootsPEM()
	if _, err := importRoots(cancelled, h.store, dir, act{actor: "user:test", now: time.Now()}, [][]byte{pem}, false, ""); err == nil {
		t.Fatal("imported without a record")
	}
	files := func() (n int) {
		list, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, f := range list {
			if !f.IsDir() {
				n++
			}
		}
		return n
	}
	if n := files(); n != 0 {
		t.Errorf("%d roots are trusted", n)
	}
	if _, err := importRoots(context.Background(), h.store, dir, act{actor: "user:test", now: time.Now()}, [][]byte{pem}, false, ""); err != nil || files() != 1 {
		t.Errorf("%d roots, %v", files(), err)
	}
}
