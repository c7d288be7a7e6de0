// Package rollout decides how a stack version goes to many sites: in waves,
// each of which waits until its sites are healthy and have stayed so for a
// while, and which stop by themselves when too many sites failed. Facts and
// time go in, sites to assign and the next state come out, with the reason.
//
// Nothing here remembers anything but the Rollout itself: whoever decides from
// the same rollout and the same facts decides the same, also after a restart.
package rollout

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// State of a rollout.
//
//	running --> done      all waves are through
//	running --> stopped   by itself: too many sites failed
//	running --> paused    by a person
//	stopped, paused --> running   a person takes it up again
//	running, stopped, paused --> aborted
//
// What has ended stays so.
type State uint8

// The states.
const (
	Running State = iota
	Paused
	Stopped
	Done
	Aborted
)

var stateNames = [...]string{"running", "paused", "stopped", "done", "aborted"}

var moves = map[State][]State{
	Running: {Paused, Stopped, Done, Aborted},
	Paused:  {Running, Aborted},
	Stopped: {Running, Aborted},
}

// String returns the word used in the CLI and the API.
func (s State) String() string { return nameOf(stateNames[:], int(s), "state") }

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return marshal(stateNames[:], int(s)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *State) UnmarshalText(b []byte) error {
	i, err := unmarshal(stateNames[:], b)
	if err == nil {
		*s = State(i)
	}
	return err
}

// MoveTo returns to if the table of moves allows s -> to.
func (s State) MoveTo(to State) (State, error) {
	if slices.Contains(moves[s], to) {
		return to, nil
	}
	return s, fmt.Errorf("rollout: a rollout cannot go from %s to %s", s, to)
}

// Live reports whether the rollout may still change sites.
func (s State) Live() bool { return s < Done }

// SiteState is how far one site is.
//
//	pending --> assigned --> healthy <--> assigned (its nodes fell back to something else)
//	assigned, healthy --> failed --> healthy (it got there after all)
//	any --> skipped (it is gone, or somebody gave it something else)
type SiteState uint8

// The states of a site.
const (
	SitePending SiteState = iota
	SiteAssigned
	SiteHealthy
	SiteFailed
	SiteSkipped
)

var siteNames = [...]string{"pending", "assigned", "healthy", "failed", "skipped"}

// String returns the word used in the CLI and the API.
func (s SiteState) String() string { return nameOf(siteNames[:], int(s), "state") }

// MarshalText implements encoding.TextMarshaler.
func (s SiteState) MarshalText() ([]byte, error) { return marshal(siteNames[:], int(s)) }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *SiteState) UnmarshalText(b []byte) error {
	i, err := unmarshal(siteNames[:], b)
	if err == nil {
		*s = SiteState(i)
	}
	return err
}

// settled reports whether the wave need not wait for the site.
func (s Site) settled() bool {
	return s.State == SiteHealthy || s.State == SiteSkipped || s.State == SiteFailed
}

// Wave is how many of all sites have the version when it is through: so many,
// or so many of a hundred, whichever is more.
type Wave struct {
	Sites   int `json:"sites,omitempty"`
	Percent int `json:"percent,omitempty"`
}

// Bounds of a plan.
const (
	MaxWaves   = 32
	MaxSites   = 10_000
	maxSeconds = 366 * 24 * 3600
)

// Plan is what a person wants.
type Plan struct {
	// Stack is the version that the sites shall run.
	Stack fleet.StackRef `json:"stack"`
	// Waves grow; the last one is all sites, whatever it says.
	Waves []Wave `json:"waves"`
	// Soak is how many seconds all sites of a wave must have been healthy
	// before the next one.
	Soak int64 `json:"soak_s"`
	// MaxFailed sites may fail; one more stops the rollout.
	MaxFailed int `json:"max_failed"`
	// Timeout is after how many seconds a site that is not healthy counts as
	// failed, also one that is out of reach; 0: never.
	Timeout int64 `json:"timeout_s"`
	// AcceptNoReturn: a step of etcd's minor, too.
	AcceptNoReturn bool `json:"accept_no_return,omitempty"`
}

// Site is one site of a rollout.
type Site struct {
	Name  string    `json:"name"`
	State SiteState `json:"state"`
	// Since is when it came into this state.
	Since time.Time `json:"since,omitzero"`
	// Assigned is when it was given the version.
	Assigned time.Time `json:"assigned,omitzero"`
	// Before is what it was to run, "" for nothing.
	Before string `json:"before,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Forgiven: it failed, and a person goes on without it.
	Forgiven bool `json:"forgiven,omitempty"`
}

// Rollout is a plan with how far it is.
type Rollout struct {
	fleet.Meta
	Plan  Plan  `json:"plan"`
	State State `json:"state"`
	// Reason is why it is in this state.
	Reason string `json:"reason,omitempty"`
	// By is who started it.
	By string `json:"by"`
	// Sites in the order in which they come.
	Sites []Site `json:"sites"`
	// Wave is the number of the wave under way, from 0.
	Wave int `json:"wave"`
	// Healthy is since when the wave has nothing to wait for but time.
	Healthy time.Time `json:"healthy,omitzero"`
}

// Validate reports all problems of the rollout.
func (r Rollout) Validate() error {
	var errs []error
	say := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	errs = append(errs, fleet.ValidateName("tenant", r.Tenant), fleet.ValidateName("rollout", r.Name))
	p := r.Plan
	errs = append(errs, fleet.ValidateName("stack", p.Stack.Name), fleet.ValidateVersion(p.Stack.Version))
	say(len(p.Waves) > 0 && len(p.Waves) <= MaxWaves, "%d waves; want 1 to %d", len(p.Waves), MaxWaves)
	for i, w := range p.Waves {
		say(w.Sites >= 0 && w.Sites <= MaxSites && w.Percent >= 0 && w.Percent <= 100 && w.Sites+w.Percent > 0, "wave %d: want a number of sites, or 1 to 100 percent", i+1)
	}
	say(p.Soak >= 0 && p.Soak <= maxSeconds, "soak_s is %d; want 0 to %d", p.Soak, maxSeconds)
	say(p.Timeout >= 0 && p.Timeout <= maxSeconds, "timeout_s is %d; want 0 to %d", p.Timeout, maxSeconds)
	say(p.MaxFailed >= 0, "max_failed is negative")
	say(len(r.Sites) > 0 && len(r.Sites) <= MaxSites, "%d sites; want 1 to %d", len(r.Sites), MaxSites)
	seen := make(map[string]bool, len(r.Sites))
	for _, s := range r.Sites {
		say(!seen[s.Name], "site %s is listed twice", s.Name)
		seen[s.Name] = true
	}
	say(r.Wave >= 0 && r.Wave < max(len(p.Waves), 1), "wave %d does not exist", r.Wave+1)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("rollout: %w", err)
	}
	return nil
}

// Target is how many of the sites have the version when a wave is through.
// Each wave has at least one site more than the one before, and the last has
// all.
func (r Rollout) Target(wave int) int {
	n, total := 0, len(r.Sites)
	for i, w := range r.Plan.Waves[:min(wave+1, len(r.Plan.Waves))] {
		n = max(n+1, w.Sites, (total*w.Percent+99)/100)
		if i == len(r.Plan.Waves)-1 {
			n = total
		}
	}
	return min(n, total)
}

// Failed counts the sites that failed and were not forgiven.
func (r Rollout) Failed() (n int) {
	for _, s := range r.Sites {
		if s.State == SiteFailed && !s.Forgiven {
			n++
		}
	}
	return n
}

// Count counts the sites of a state.
func (r Rollout) Count(state SiteState) (n int) {
	for _, s := range r.Sites {
		if s.State == state {
			n++
		}
	}
	return n
}

// Fact is what is known of one site.
type Fact struct {
	// Gone: there is no such site any more.
	Gone bool
	// Desired is what it shall run ("NAME@VERSION"), "" for nothing.
	Desired string
	// Healthy: all its nodes run what they shall, and none has judged it bad.
	// Broken: a node will not get there by itself. Empty: it has no nodes.
	Healthy, Broken, Empty bool
	// Why it is not healthy, in a sentence.
	Why string
}

// Decide brings the rollout up to date with the facts and says which sites are
// to be assigned now. Facts of sites that are not named leave them as they are.
// changed says that the rollout is to be written.
func Decide(now time.Time, r Rollout, facts map[string]Fact) (next Rollout, assign []string, changed bool) {
	next = r
	if r.State != Running {
		return next, nil, false
	}
	next.Sites = slices.Clone(r.Sites)
	for i := range next.Sites {
		s := &next.Sites[i]
		f, known := facts[s.Name]
		if !known {
			continue
		}
		state, why := judge(now, next.Plan, *s, f)
		if state != s.State {
			s.State, s.Since = state, now
			changed = true
		}
		if why != s.Reason {
			s.Reason, changed = why, true
		}
	}
	if n := next.Failed(); n > next.Plan.MaxFailed {
		next.State, next.Healthy = Stopped, time.Time{}
		next.Reason = fmt.Sprintf("%d sites failed, and at most %d may: %s", n, next.Plan.MaxFailed, next.failures())
		return next, nil, true
	}
	for {
		target := next.Target(next.Wave)
		waits := false
		for _, s := range next.Sites[:target] {
			if s.State == SitePending {
				assign = append(assign, s.Name)
			}
			waits = waits || !s.settled()
		}
		switch {
		case waits && !next.Healthy.IsZero():
			next.Healthy = time.Time{}
			return next, assign, true
		case waits:
			return next, assign, changed
		case next.Healthy.IsZero():
			next.Healthy, changed = now, true
		}
		if now.Sub(next.Healthy) < time.Duration(next.Plan.Soak)*time.Second {
			return next, nil, changed
		}
		next.Healthy, changed = time.Time{}, true
		if next.Wave == len(next.Plan.Waves)-1 {
			next.State, next.Reason = Done, next.summary()
			return next, nil, true
		}
		next.Wave++
	}
}

// judge says how far one site is.
func judge(now time.Time, p Plan, s Site, f Fact) (SiteState, string) {
	want := p.Stack.ID()
	switch {
	case s.State == SiteSkipped:
		return s.State, s.Reason
	case f.Gone:
		return SiteSkipped, "it is not there any more"
	case s.State == SitePending:
		return s.State, s.Reason
	case f.Desired != want && s.Assigned.IsZero():
		return s.State, s.Reason // it was refused
	case f.Desired != want:
		if f.Desired == "" {
			return SiteSkipped, "somebody took the stack away from it"
		}
		return SiteSkipped, "somebody gave it " + f.Desired
	case f.Healthy:
		return SiteHealthy, ""
	case f.Empty:
		return SiteHealthy, "it has no nodes: they begin with this version"
	case f.Broken:
		return SiteFailed, f.Why
	case s.State == SiteFailed:
		return s.State, s.Reason
	case p.Timeout > 0 && now.Sub(s.Assigned) >= time.Duration(p.Timeout)*time.Second:
		return SiteFailed, fmt.Sprintf("not there after %s: %s", time.Duration(p.Timeout)*time.Second, f.Why)
	}
	return SiteAssigned, f.Why
}

// failures names some of the sites that failed, with their reasons.
func (r Rollout) failures() string {
	const shown = 3
	out, n := "", 0
	for _, s := range r.Sites {
		if s.State != SiteFailed || s.Forgiven {
			continue
		}
		if n++; n > shown {
			continue
		}
		if out != "" {
			out += "; "
		}
		out += s.Name + " (" + s.Reason + ")"
	}
	if n > shown {
		out += fmt.Sprintf("; and %d more", n-shown)
	}
	return out
}

func (r Rollout) summary() string {
	out := fmt.Sprintf("%d of %d sites are healthy", r.Count(SiteHealthy), len(r.Sites))
	if n := r.Count(SiteFailed); n > 0 {
		out += fmt.Sprintf(", %d failed", n)
	}
	if n := r.Count(SiteSkipped); n > 0 {
		out += fmt.Sprintf(", %d were skipped", n)
	}
	return out
}

// Assigned notes that a site was given the version.
func (r *Rollout) Assigned(now time.Time, name, before string) {
	if s := r.site(name); s != nil {
		s.State, s.Since, s.Assigned, s.Before, s.Reason = SiteAssigned, now, now, before, ""
	}
}

// Refused notes that a site cannot be given the version: it counts as failed.
func (r *Rollout) Refused(now time.Time, name, why string) {
	if s := r.site(name); s != nil {
		s.State, s.Since, s.Reason = SiteFailed, now, why
	}
}

func (r *Rollout) site(name string) *Site {
	i := slices.IndexFunc(r.Sites, func(s Site) bool { return s.Name == name })
	if i < 0 {
		return nil
	}
	return &r.Sites[i]
}

// Pause, Resume and Abort are what people do.

// Pause keeps the rollout from giving the version to more sites.
func Pause(r Rollout, reason string) (Rollout, error) {
	to, err := r.State.MoveTo(Paused)
	if err != nil {
		return r, err
	}
	r.State, r.Reason, r.Healthy = to, reason, time.Time{}
	return r, nil
}

// Resume goes on. Sites that failed so far are forgiven: they neither hold it
// up nor count again.
func Resume(r Rollout, reason string) (Rollout, error) {
	if r.State == Running {
		return r, errors.New("rollout: it runs already")
	}
	to, err := r.State.MoveTo(Running)
	if err != nil {
		return r, err
	}
	r.State, r.Reason, r.Healthy = to, reason, time.Time{}
	r.Sites = slices.Clone(r.Sites)
	for i := range r.Sites {
		if r.Sites[i].State == SiteFailed {
			r.Sites[i].Forgiven = true
		}
	}
	return r, nil
}

// Abort ends the rollout. Sites that have the version keep it.
func Abort(r Rollout, reason string) (Rollout, error) {
	to, err := r.State.MoveTo(Aborted)
	if err != nil {
		return r, err
	}
	r.State, r.Reason = to, reason
	return r, nil
}

// Explain says what the rollout does or waits for.
func Explain(now time.Time, r Rollout) string {
	if r.State != Running {
		return r.Reason
	}
	target := r.Target(r.Wave)
	wave := fmt.Sprintf("wave %d of %d (%d of %d sites)", r.Wave+1, len(r.Plan.Waves), target, len(r.Sites))
	waiting, first := 0, ""
	for _, s := range r.Sites[:target] {
		if s.settled() {
			continue
		}
		if waiting++; first == "" {
			first = s.Name
			if s.Reason != "" {
				first += " (" + s.Reason + ")"
			}
		}
	}
	switch {
	case waiting == 1:
		return wave + " waits for " + first
	case waiting > 1:
		return fmt.Sprintf("%s waits for %s and %d more", wave, first, waiting-1)
	case r.Healthy.IsZero():
		return wave + " is through"
	}
	return fmt.Sprintf("%s is healthy for %s, and shall be for %s", wave, now.Sub(r.Healthy).Round(time.Second), time.Duration(r.Plan.Soak)*time.Second)
}

func nameOf(names []string, i int, what string) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("%s(%d)", what, i)
}

func marshal(names []string, i int) ([]byte, error) {
	if i >= len(names) {
		return nil, fmt.Errorf("rollout: write state %d: there is none", i)
	}
	return []byte(names[i]), nil
}

func unmarshal(names []string, b []byte) (int, error) {
	if i := slices.Index(names, string(b)); i >= 0 {
		return i, nil
	}
	return 0, fmt.Errorf("rollout: state %.40q does not exist", b)
}
