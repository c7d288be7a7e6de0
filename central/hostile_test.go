package central

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
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
