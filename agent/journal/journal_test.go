package journal

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

const (
	nodeA = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")
	nodeB = fleet.NodeID("n-bbbbbbbbbbbbbbbbbbbbbbbb")
)

func full() cb.Disk {
	return cb.Disk{
		Role:   cb.RoleCandidate,
		Record: &cb.Record{UID: "u1", Epoch: 3, Version: 4, Founder: nodeA, Servers: []fleet.NodeID{nodeA, nodeB}, Into: "u2"},
		Intent: &cb.Intent{UID: "u1", Boot: "b", Mode: fleet.FoundFirst},
		Ack:    &cb.Claim{Node: nodeB, Round: 7, Token: "t"},
		Step:   &cb.Step{Plan: "p", N: 2, Epoch: 3, Leader: nodeA, Phase: cb.StepSwitched, Replace: true},
		Lead:   &cb.Lead{Plan: "p", Epoch: 3, Phase: cb.LeadConfirming, Candidates: []fleet.NodeID{nodeB}},
		Reset:  &cb.Reset{Plan: "p", To: 4, Snapshot: "s", UID: "u"},
		Aside:  true,
		Addrs:  map[fleet.NodeID]string{nodeB: "192.0.2.7"},
	}
}

// observed are the fields of a Disk that the journal does not keep.
var observed = map[string]bool{"Datastore": true, "Tombstone": true, "ResetFlag": true, "AgentCert": true, "Mark": true}

// TestEveryFieldIsKept fails when the planner's Disk has a field that the
// journal drops, and when full() above does not set one.
func TestEveryFieldIsKept(t *testing.T) {
	d := full()
	var walk func(v reflect.Value, name string)
	walk = func(v reflect.Value, name string) {
		switch v.Kind() {
		case reflect.Pointer:
			if v.IsNil() {
				t.Errorf("%s is not set by the test", name)
				return
			}
			walk(v.Elem(), name)
		case reflect.Struct:
			for i := range v.NumField() {
				if f := v.Type().Field(i).Name; !observed[f] || v.Type() != reflect.TypeFor[cb.Disk]() {
					walk(v.Field(i), name+"."+f)
				}
			}
		default:
			if v.IsZero() {
				t.Errorf("%s is not set by the test", name)
			}
		}
	}
	walk(reflect.ValueOf(d), "Disk")

	dir := t.TempDir()
	j := mustOpen(t, dir)
	d.Datastore, d.Mark = true, "u1" // must not be kept
	if err := j.Update(func(x *cb.Disk) { *x = d }); err != nil {
		t.Fatal(err)
	}
	want := full()
	if diff := cmp.Diff(want, j.Disk()); diff != "" {
		t.Errorf("in memory:\n%s", diff)
	}
	mustClose(t, j)
	j = mustOpen(t, dir)
	defer mustClose(t, j)
	if diff := cmp.Diff(want, j.Disk()); diff != "" {
		t.Errorf("read back:\n%s", diff)
	}
	if j.Boots() != 2 {
		t.Errorf("boots: %d, want 2", j.Boots())
	}
}

func mustOpen(t *testing.T, dir string) *Journal {
	t.Helper()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func mustClose(t *testing.T, j *Journal) {
	t.Helper()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}

func role(r cb.Role) func(*cb.Disk) { return func(d *cb.Disk) { d.Role = r } }

func TestDamage(t *testing.T) {
	read := func(t *testing.T, dir string, i int) []byte {
		b, err := os.ReadFile(filepath.Join(dir, copies[i]))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	put := func(t *testing.T, dir string, i int, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, copies[i]), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	flip := func(t *testing.T, dir string, i, at int) {
		b := read(t, dir, i)
		b[(at+len(b))%len(b)] ^= 1
		put(t, dir, i, b)
	}
	newer := func(t *testing.T, dir string, i int) {
		put(t, dir, i, bytes.Replace(read(t, dir, i), []byte(format), []byte(formatStem+"2"), 1))
	}
	for _, c := range []struct {
		name   string
		hurt   func(t *testing.T, dir string)
		want   error
		mended int
	}{
		{"when nothing is wrong then it opens", func(*testing.T, string) {}, nil, 0},
		{"when the first copy has a wrong bit then the second serves", func(t *testing.T, d string) { flip(t, d, 0, -3) }, nil, 1},
		{"when the second copy has a wrong bit then the first serves", func(t *testing.T, d string) { flip(t, d, 1, 2) }, nil, 1},
		{"when one copy is gone then the other serves", func(t *testing.T, d string) { _ = os.Remove(filepath.Join(d, copies[0])) }, nil, 0},
		{"when one copy is empty then the other serves", func(t *testing.T, d string) { put(t, d, 1, nil) }, nil, 1},
		{"when both are damaged then a person decides", func(t *testing.T, d string) { flip(t, d, 0, -3); flip(t, d, 1, -9) }, ErrDamaged, 0},
		{"when both are empty then a person decides", func(t *testing.T, d string) { put(t, d, 0, nil); put(t, d, 1, nil) }, ErrDamaged, 0},
		{"when one is gone and one damaged then a person decides", func(t *testing.T, d string) { _ = os.Remove(filepath.Join(d, copies[1])); flip(t, d, 0, 0) }, ErrDamaged, 0},
		{"when one is longer than any journal then the other serves", func(t *testing.T, d string) { put(t, d, 0, make([]byte, maxFile+9)) }, nil, 1},
		{"when both are newer then it says so", func(t *testing.T, d string) { newer(t, d, 0); newer(t, d, 1) }, ErrNewer, 0},
		{"when only one is newer then the older is not used either", func(t *testing.T, d string) { newer(t, d, 1) }, ErrNewer, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			j := mustOpen(t, dir)
			if err := j.Update(role(cb.RoleWorker)); err != nil {
				t.Fatal(err)
			}
			mustClose(t, j)
			c.hurt(t, dir)
			j, err := Open(dir)
			if !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if err != nil {
				return
			}
			if j.Disk().Role != cb.RoleWorker {
				t.Errorf("role %s", j.Disk().Role)
			}
			if len(j.Mended()) != c.mended {
				t.Errorf("mended %v, want %d", j.Mended(), c.mended)
			}
			mustClose(t, j)
			for i := range copies { // both are whole again
				if _, _, err := decode(read(t, dir, i)); err != nil {
					t.Errorf("copy %d: %v", i, err)
				}
			}
		})
	}
}

func TestAFieldOfANewerProgramIsNotDropped(t *testing.T) {
	b, err := state{}.encode(1)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := bytes.Cut(b, []byte("\n"))
	for old, want := range map[string]error{`"role":"none"`: nil, `"role":"none","wings":2`: ErrNewer, `"role":"observer"`: ErrNewer} {
		nb := bytes.Replace(body, []byte(`"role":"none"`), []byte(old), 1)
		_, _, err := decode(seal(nb))
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", old, err, want)
		}
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	j := mustOpen(t, dir)
	if _, err := Open(dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("second open: %v", err)
	}
	mustClose(t, j)
	mustClose(t, mustOpen(t, dir))
}

var errCut = errors.New("power cut")

// TestPowerCut cuts the power at every point of a series of writes and opens
// the journal again: every acknowledged write is there, and what is there is
// one of the states that were written, never a mixture.
func TestPowerCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "journal")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		acked, tried := "", "" // Intent.UID of the last acknowledged and of the last begun write
		boots := uint64(0)
		for range rapid.IntRange(1, 6).Draw(t, "runs") {
			left := rapid.IntRange(0, 60).Draw(t, "points until the cut")
			cut := func(string) error {
				if left--; left < 0 {
					return errCut
				}
				return nil
			}
			j, err := open(dir, cut)
			if err != nil {
				if !errors.Is(err, errCut) {
					t.Fatalf("open: %v", err)
				}
				continue
			}
			if j.Boots() <= boots {
				t.Fatalf("boots %d after %d", j.Boots(), boots)
			}
			boots = j.Boots()
			got := ""
			if in := j.Disk().Intent; in != nil {
				got = in.UID
			}
			if got != acked && got != tried {
				t.Fatalf("found %q; acknowledged was %q, begun %q", got, acked, tried)
			}
			acked, tried = got, got
			for n := 0; ; n++ {
				tried = fmt.Sprintf("%d-%d", boots, n)
				if err := j.Update(func(d *cb.Disk) { d.Intent = &cb.Intent{UID: tried} }); err != nil {
					if !errors.Is(err, errCut) {
						t.Fatal(err)
					}
					break
				}
				acked = tried
			}
			if err := j.Update(func(*cb.Disk) {}); !errors.Is(err, ErrFailed) {
				t.Fatalf("a write after a failed one: %v", err)
			}
			if j.Disk().Intent != nil && j.Disk().Intent.UID != acked {
				t.Fatalf("memory says %q, acknowledged was %q", j.Disk().Intent.UID, acked)
			}
			_ = j.lock.Close() // what a dead process leaves
			if rapid.Bool().Draw(t, "a bad block") {
				i := rapid.IntRange(0, 1).Draw(t, "in copy")
				name := filepath.Join(dir, copies[i])
				b, err := os.ReadFile(name)
				other, oerr := os.ReadFile(filepath.Join(dir, copies[1-i]))
				// One bad copy is survived; the other must be acknowledged
				// state, as it is unless the cut came between the two.
				if err != nil || oerr != nil || len(b) == 0 {
					continue
				}
				s, _, derr := decode(other)
				if derr != nil {
					t.Fatalf("a copy is broken after a cut: %v", derr)
				}
				at := rapid.IntRange(0, len(b)-1).Draw(t, "at")
				b[at] ^= 0x40
				if err := os.WriteFile(name, b, 0o600); err != nil {
					t.Fatal(err)
				}
				alone := ""
				if s.Disk.Intent != nil {
					alone = s.Disk.Intent.UID
				}
				if alone != acked && alone != tried {
					t.Fatalf("one copy alone says %+v, acknowledged was %q", s.Disk.Intent, acked)
				}
			}
		}
	})
}

func TestMendAfterAFailedWrite(t *testing.T) {
	dir := t.TempDir()
	full := false
	j, err := open(dir, func(point string) error {
		if full && strings.HasSuffix(point, ".b.half") {
			return errors.New("no space left")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, j)
	full = true
	if err := j.Update(role(cb.RoleServer)); err == nil {
		t.Fatal("the write succeeded on a full disk")
	}
	if j.Disk().Role != cb.RoleNone || j.Failed() == nil {
		t.Fatalf("after a failed write: role %s, failure %v", j.Disk().Role, j.Failed())
	}
	if err := j.Mend(); err == nil {
		t.Fatal("mended while the disk is full")
	}
	full = false
	if err := j.Mend(); err != nil {
		t.Fatal(err)
	}
	// The first copy had been written: that is what is true now.
	if j.Disk().Role != cb.RoleServer || j.Failed() != nil || j.Boots() != 1 {
		t.Fatalf("after mending: role %s, failure %v, boots %d", j.Disk().Role, j.Failed(), j.Boots())
	}
	left, err := filepath.Glob(filepath.Join(dir, ".cluster*"))
	if err != nil || len(left) > 0 {
		t.Errorf("leftovers %v, %v", left, err)
	}
}

func TestTooMuchIsRefusedAndHarmsNothing(t *testing.T) {
	j := mustOpen(t, t.TempDir())
	defer mustClose(t, j)
	many := map[fleet.NodeID]string{}
	for i := range maxAddrs + 1 {
		many[fleet.NodeID(fmt.Sprint(i))] = "192.0.2.1"
	}
	if err := j.Update(func(d *cb.Disk) { d.Addrs = many }); err == nil {
		t.Fatal("accepted")
	}
	if err := j.Update(func(d *cb.Disk) { d.Role = cb.Role(9) }); err == nil {
		t.Fatal("a role without a name was written")
	}
	if err := j.Update(role(cb.RoleWorker)); err != nil {
		t.Fatalf("after a refusal: %v", err)
	}
}

// TestKillAtEveryPoint kills a real process at every line of a write.
func TestKillAtEveryPoint(t *testing.T) {
	if dir := os.Getenv("JOURNAL_VICTIM"); dir != "" {
		victim(dir)
		return
	}
	exe := crashtest.Binary(t)
	for _, name := range copies {
		for _, point := range []string{"begin", "half", "before-rename", "before-dirsync", "end"} {
			for nth := 1; nth <= 3; nth++ { // in Open, in the first and in the second Update
				dir := t.TempDir()
				c := exec.Command(exe, "-test.run", "TestKillAtEveryPoint")
				c.Env = append(os.Environ(), "JOURNAL_VICTIM="+dir, fmt.Sprintf("MUSTER_FAILPOINT=journal.%s.%s,%d", name, point, nth))
				out, err := c.Output()
				if err == nil {
					t.Fatalf("%s %s %d: was not killed", name, point, nth)
				}
				acked := strings.Count(string(out), "acked ")
				j := mustOpen(t, dir)
				if got := int(j.Disk().Role); got < acked || got > acked+1 {
					t.Errorf("%s %s %d: %d writes acknowledged, found %d", name, point, nth, acked, got)
				}
				mustClose(t, j)
				if left, _ := filepath.Glob(filepath.Join(dir, ".cluster*")); len(left) > 0 {
					t.Errorf("%s %s %d: leftovers %v", name, point, nth, left)
				}
			}
		}
	}
}

// victim writes roles 1, 2, 3 and says which were acknowledged.
func victim(dir string) {
	j, err := Open(dir)
	if err != nil {
		fmt.Println("open:", err)
		return
	}
	for r := cb.RoleWorker; r <= cb.RoleServer; r++ {
		if err := j.Update(role(r)); err != nil {
			fmt.Println("update:", err)
			return
		}
		fmt.Println("acked", r)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := state{Boots: 3, Disk: full()}.encode(9)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(seal([]byte(`{"boots":1,"role":"worker"}`)))
	f.Add([]byte("muster/journal/v2 1 2 3\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, g, err := decode(b)
		if err != nil {
			return
		}
		again, err := s.encode(g)
		if err != nil {
			t.Fatalf("was read and cannot be written: %v", err)
		}
		s2, g2, err := decode(again)
		if err != nil || g2 != g || !cmp.Equal(s.Disk, s2.Disk) || s.Boots != s2.Boots {
			t.Fatalf("read differently the second time: %v", err)
		}
	})
}

// seal puts the first line before a body.
func seal(body []byte) []byte {
	sum := sha256.Sum256(body)
	return append(fmt.Appendf(nil, "%s 1 %d %x\n", format, len(body), sum), body...)
}
