package rollout

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

var start = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

func plan(sites int, change func(*Plan)) Rollout {
	r := Rollout{
		Meta: fleet.Meta{Tenant: "default", Name: "r"},
		Plan: Plan{Stack: fleet.StackRef{Name: "shop", Version: "2"}, Waves: []Wave{{Sites: 1}, {Percent: 10}, {Percent: 100}}, Soak: 600, MaxFailed: 1, Timeout: 7200},
	}
	for i := range sites {
		r.Sites = append(r.Sites, Site{Name: fmt.Sprintf("s-%03d", i)})
	}
	if change != nil {
		change(&r.Plan)
	}
	return r
}

func TestTargets(t *testing.T) {
	for _, row := range []struct {
		sites int
		waves []Wave
		want  []int
	}{
		{50, []Wave{{Sites: 1}, {Percent: 10}, {Percent: 100}}, []int{1, 5, 50}},
		{5, []Wave{{Sites: 1}, {Percent: 10}, {Percent: 100}}, []int{1, 2, 5}},
		{1, []Wave{{Sites: 1}, {Percent: 10}, {Percent: 100}}, []int{1, 1, 1}},
		{10, []Wave{{Sites: 3}}, []int{10}},
		{10, []Wave{{Percent: 50}, {Sites: 2}, {Percent: 60}}, []int{5, 6, 10}},
	} {
		r := plan(row.sites, func(p *Plan) { p.Waves = row.waves })
		for i, want := range row.want {
			if got := r.Target(i); got != want {
				t.Errorf("%d sites, %v: wave %d has %d, want %d", row.sites, row.waves, i, got, want)
			}
		}
	}
}

// world is some sites that get there, or do not.
type world struct {
	t     *testing.T
	now   time.Time
	r     Rollout
	facts map[string]Fact
	given map[string]time.Time
}

func newWorld(t *testing.T, r Rollout) *world {
	t.Helper()
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, now: start, r: r, facts: map[string]Fact{}, given: map[string]time.Time{}}
	for _, s := range r.Sites {
		w.facts[s.Name] = Fact{Desired: "shop@1", Why: "it runs shop@1"}
	}
	return w
}

// step decides once, from what was written last, and does it.
func (w *world) step() {
	w.t.Helper()
	b, err := json.Marshal(w.r)
	if err != nil {
		w.t.Fatal(err)
	}
	var r Rollout
	if err := json.Unmarshal(b, &r); err != nil {
		w.t.Fatal(err)
	}
	next, assign, changed := Decide(w.now, r, w.facts)
	if !changed && !reflect.DeepEqual(next, r) {
		w.t.Fatalf("it changed, and is not written:\n%+v\n%+v", r, next)
	}
	for _, name := range assign {
		next.Assigned(w.now, name, "shop@1")
		f := w.facts[name]
		f.Desired, f.Why = "shop@2", "it is on its way"
		w.facts[name] = f
		w.given[name] = w.now
	}
	w.r = next
}

func (w *world) fact(name string, change func(*Fact)) {
	f := w.facts[name]
	change(&f)
	w.facts[name] = f
}

func (w *world) healthy(from, to int) {
	for i := from; i < to; i++ {
		w.fact(fmt.Sprintf("s-%03d", i), func(f *Fact) { f.Healthy, f.Broken = true, false })
	}
}

func (w *world) after(d time.Duration) { w.now = w.now.Add(d); w.step() }

func (w *world) want(state State, given int, reason string) {
	w.t.Helper()
	if why := Explain(w.now, w.r); w.r.State != state || len(w.given) != given || !strings.Contains(why, reason) {
		w.t.Fatalf("%s, %d given, %q; want %s, %d, %q", w.r.State, len(w.given), why, state, given, reason)
	}
}

// TestWaves: each wave waits for health, then for the soak time.
func TestWaves(t *testing.T) {
	w := newWorld(t, plan(20, nil))
	w.step()
	w.want(Running, 1, "wave 1 of 3 (1 of 20 sites) waits for s-000")
	w.after(time.Hour)
	w.want(Running, 1, "s-000 (it is on its way)")
	w.healthy(0, 1)
	w.after(time.Minute)
	w.want(Running, 1, "healthy for 0s, and shall be for 10m")
	// It falls back in the soak time, which then begins anew.
	w.fact("s-000", func(f *Fact) { f.Healthy, f.Why = false, "a node restarts" })
	w.after(9 * time.Minute)
	w.want(Running, 1, "a node restarts")
	w.healthy(0, 1)
	w.after(time.Minute)
	w.after(9*time.Minute + 59*time.Second)
	w.want(Running, 1, "healthy for 9m59s")
	w.after(time.Second)
	w.want(Running, 2, "wave 2 of 3 (2 of 20 sites) waits for s-001")
	w.healthy(0, 2)
	w.step()
	w.after(10 * time.Minute)
	w.want(Running, 20, "wave 3 of 3 (20 of 20 sites) waits for s-002 and 17 more")
	w.healthy(0, 20)
	w.step()
	w.after(10 * time.Minute)
	w.want(Done, 20, "20 of 20 sites are healthy")
	w.after(time.Hour)
	w.want(Done, 20, "")
}

// TestStops: too many failures stop it with their reasons, and a person goes
// on without these sites.
func TestStops(t *testing.T) {
	w := newWorld(t, plan(4, func(p *Plan) { p.Waves, p.Soak = []Wave{{Percent: 100}}, 0 }))
	w.step()
	w.fact("s-000", func(f *Fact) { f.Broken, f.Why = true, "image shop@2 was judged bad" })
	w.step()
	w.want(Running, 4, "s-001")
	// Time is up for the others: one of them is out of reach.
	w.healthy(2, 4)
	w.after(2 * time.Hour)
	w.want(Stopped, 4, "2 sites failed, and at most 1 may: s-000 (image shop@2 was judged bad); s-001 (not there after 2h0m0s: it is on its way)")
	r, err := Resume(w.r, "these two are broken machines")
	if err != nil {
		t.Fatal(err)
	}
	w.r = r
	w.step()
	w.want(Done, 4, "2 of 4 sites are healthy, 2 failed")
}

// TestPeople: pause, resume and abort, and what a person does to sites.
func TestPeople(t *testing.T) {
	w := newWorld(t, plan(3, func(p *Plan) { p.Waves, p.Soak = []Wave{{Sites: 1}, {Percent: 100}}, 0 }))
	w.step()
	r, err := Pause(w.r, "the shop is full")
	if err != nil {
		t.Fatal(err)
	}
	w.r = r
	w.healthy(0, 1)
	w.after(time.Hour)
	w.want(Paused, 1, "the shop is full")
	if _, err := Pause(w.r, ""); err == nil {
		t.Error("paused twice")
	}
	if w.r, err = Resume(w.r, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Resume(w.r, ""); err == nil {
		t.Error("resumed twice")
	}
	w.step()
	w.want(Running, 3, "s-001")
	w.fact("s-001", func(f *Fact) { f.Desired = "shop@3" })
	w.fact("s-002", func(f *Fact) { f.Gone = true })
	w.step()
	w.want(Done, 3, "1 of 3 sites are healthy, 2 were skipped")
	if _, err := Abort(w.r, "x"); err == nil {
		t.Error("what is done was aborted")
	}
	w = newWorld(t, plan(3, nil))
	w.step()
	if w.r, err = Abort(w.r, "another version comes"); err != nil {
		t.Fatal(err)
	}
	w.healthy(0, 3)
	w.after(time.Hour)
	w.want(Aborted, 1, "another version comes")
	// A site that cannot be given the version has failed; an empty one has not.
	w = newWorld(t, plan(2, func(p *Plan) { p.Waves, p.MaxFailed, p.Soak = []Wave{{Sites: 2}}, 0, 0 }))
	w.fact("s-000", func(f *Fact) { f.Empty = true })
	w.step()
	w.r.Refused(w.now, "s-001", "a point of no return")
	w.fact("s-001", func(f *Fact) { f.Desired = "shop@1" })
	w.r.Sites[1].Assigned = time.Time{}
	w.step()
	w.want(Stopped, 2, "s-001 (a point of no return)")
	if w.r.Sites[0].State != SiteHealthy {
		t.Errorf("%+v", w.r.Sites[0])
	}
}

func TestMoves(t *testing.T) {
	for s := Running; s <= Aborted; s++ {
		b, err := s.MarshalText()
		var again State
		if err != nil || again.UnmarshalText(b) != nil || again != s {
			t.Errorf("%s", s)
		}
		for to := Running; to <= Aborted; to++ {
			_, err := s.MoveTo(to)
			if !s.Live() && err == nil {
				t.Errorf("%s --> %s", s, to)
			}
		}
	}
	var s SiteState
	if s.UnmarshalText([]byte("none")) == nil || (Rollout{}).Validate() == nil {
		t.Error("nonsense was taken")
	}
}

// TestSimulation: many rollouts over sites that take their time, fail, fall
// back and come back, decided anew from what was written before every step, as
// after a restart.
func TestSimulation(t *testing.T) {
	ended := map[State]int{}
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		r := plan(1+rnd.IntN(40), func(p *Plan) {
			p.Soak, p.MaxFailed, p.Timeout = int64(rnd.IntN(3))*600, rnd.IntN(4), 1800+int64(rnd.IntN(3))*3600
			if rnd.IntN(3) == 0 {
				p.Waves = []Wave{{Percent: 100}}
			}
		})
		w := newWorld(t, r)
		bad := rnd.Float64() * 0.3
		resumed := 0
		for step := 0; ; step++ {
			if step > 5000 {
				t.Fatalf("seed %d: without end: %s", seed, Explain(w.now, w.r))
			}
			before := w.r
			w.step()
			if n := w.r.Target(w.r.Wave); len(w.given) > n {
				t.Fatalf("seed %d: %d sites have it, and wave %d is %d", seed, len(w.given), w.r.Wave+1, n)
			}
			if w.r.Wave > before.Wave || w.r.State == Done && before.State != Done {
				for _, s := range w.r.Sites[:before.Target(before.Wave)] {
					if s.State == SitePending || s.State == SiteAssigned && w.given[s.Name] != w.now {
						t.Fatalf("seed %d: on from wave %d although %s is %s", seed, before.Wave+1, s.Name, s.State)
					}
				}
				if before.Failed() > w.r.Plan.MaxFailed {
					t.Fatalf("seed %d: on although %d failed", seed, before.Failed())
				}
			}
			if w.r.State == Stopped {
				if w.r.Failed() <= w.r.Plan.MaxFailed || w.r.Reason == "" {
					t.Fatalf("seed %d: stopped for nothing: %q", seed, w.r.Reason)
				}
				if resumed++; resumed > 1 {
					break
				}
				next, err := Resume(w.r, "go on")
				if err != nil {
					t.Fatal(err)
				}
				w.r = next
			}
			if !w.r.State.Live() {
				break
			}
			w.now = w.now.Add(time.Duration(10+rnd.IntN(300)) * time.Second)
			for name := range w.given {
				switch x := rnd.Float64(); {
				case x < bad*0.05:
					w.fact(name, func(f *Fact) { f.Healthy, f.Broken, f.Why = false, true, "judged bad" })
				case x < 0.02:
					w.fact(name, func(f *Fact) { f.Healthy, f.Why = false, "restarts" })
				case x < 0.3:
					w.fact(name, func(f *Fact) { f.Healthy, f.Broken = true, false })
				}
			}
		}
		ended[w.r.State]++
		if err := w.r.Validate(); err != nil {
			t.Fatal(err)
		}
	}
	if ended[Done] == 0 || ended[Stopped] == 0 {
		t.Errorf("%v: the simulation does not reach both ends", ended)
	}
}
