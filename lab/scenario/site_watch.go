package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// nodeStatus is what `muster-node status -o json` says, as far as the lab
// looks at it. It is written by hand: a field that was renamed is a failure.
type nodeStatus struct {
	Node       string `json:"node"`
	Site       string `json:"site"`
	ClusterUID string `json:"cluster_uid"`
	Epoch      uint64 `json:"epoch"`
	State      string `json:"state"`
	Role       string `json:"role"`
	Reason     string `json:"reason"`
	Blocker    string `json:"blocker"`
	Boot       string `json:"boot"`
	Address    string `json:"address"`
}

// Words of nodeStatus.
const (
	roleNone      = "none"
	roleWorker    = "worker"
	roleCandidate = "candidate"
	roleServer    = "server"
)

// askStatus asks a node's agent how it is.
func (b *box) askStatus(ctx context.Context) (nodeStatus, error) {
	var st nodeStatus
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := b.Exec(ctx, b.s.l.Spec.NodeProgram, "status", "-o", "json")
	if err != nil {
		return st, err
	}
	if out.Code != 0 {
		return st, fmt.Errorf("scenario: status of %s: exit code %d: %s", b.Name(), out.Code, strings.TrimSpace(string(out.Stderr)))
	}
	if err := json.Unmarshal(out.Stdout, &st); err != nil {
		return st, fmt.Errorf("scenario: status of %s: %w", b.Name(), err)
	}
	return st, nil
}

// view is what is known at a moment.
type view struct {
	at     time.Time
	status map[string]nodeStatus // by node; those that answered
	truths []truth
	best   truth
	// any: there is a truth at all.
	any bool
}

// role of a node, "" if it does not say.
func (v view) role(b *box) string { return v.status[b.Name()].Role }

// with returns the nodes of a role.
func (v view) with(s *shop, role string) []*box {
	var out []*box
	for _, b := range s.nodes {
		if v.role(b) == role {
			out = append(out, b)
		}
	}
	return out
}

// growing returns the clusters that may take in nodes: the UIDs of those with
// a server whose agent does not say that it is fenced.
func (v view) growing() []string {
	found := map[string]bool{}
	for _, st := range v.status {
		if (st.Role == roleServer || st.Role == roleCandidate) && st.State != "fenced" && st.State != "leaving" && st.ClusterUID != "" {
			found[st.ClusterUID] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// blockers lists what nodes say they wait for.
func (v view) blockers() []string {
	found := map[string]bool{}
	for _, st := range v.status {
		if st.Blocker != "" {
			found[st.Blocker] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

func (v view) String() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(v.status)) {
		st := v.status[name]
		out = append(out, fmt.Sprintf("%s: %s, %s, %q, blocker %q", name, st.State, st.Role, st.Reason, st.Blocker))
	}
	if v.any {
		out = append(out, v.best.String())
	}
	return strings.Join(out, "\n")
}

// Limits of what the watch tolerates.
const (
	// watchEvery is the pause between two looks.
	watchEvery = time.Second
	// restless is how long a number of voters other than 1 and 3 may last
	// while no node names a blocker.
	restless = time.Minute
	// meetWithin is how long two clusters that hear each other may both grow.
	meetWithin = 75 * time.Second
	// maxFlips is how often a node's role may change in a run.
	maxFlips = 8
)

// watch looks at the shop all the time and remembers what must never be.
type watch struct {
	s    *shop
	stop context.CancelFunc
	done chan struct{}
	news chan struct{} // closed and replaced with each look

	mu    sync.Mutex
	last  view
	wrong map[string]error
	// apart: the LAN is split, so two clusters cannot know of each other.
	apart      bool
	togetherAt time.Time
	two        time.Time // since when two clusters grow
	even       time.Time // since when voters are neither 1 nor 3
	roles      map[string][]string
	demote     map[string]bool // may go from server to worker
	looks      int
	sawState   map[string]bool
}

func newWatch(s *shop) *watch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watch{s: s, stop: cancel, done: make(chan struct{}), news: make(chan struct{}), wrong: map[string]error{},
		roles: map[string][]string{}, demote: map[string]bool{}, sawState: map[string]bool{}}
	go w.run(ctx)
	return w
}

func (w *watch) end() {
	w.stop()
	<-w.done
	w.s.l.Footer("")
}

func (w *watch) run(ctx context.Context) {
	defer close(w.done)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		v := w.look(ctx)
		if ctx.Err() == nil {
			w.judge(v)
			w.s.l.Footer(w.table(v))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (w *watch) look(ctx context.Context) view {
	v := view{at: time.Now(), status: map[string]nodeStatus{}}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(3)
	for _, b := range w.s.nodes {
		if _, on := b.On(); !on {
			continue
		}
		g.Go(func() error {
			if st, err := b.askStatus(ctx); err == nil {
				mu.Lock()
				v.status[b.Name()] = st
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // nobody returns an error: a node without an answer is not in the view
	v.truths = w.s.truths(ctx)
	v.best, v.any = best(v.truths)
	return v
}

// judge holds what was seen against what must always be.
func (w *watch) judge(v view) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := v.at
	w.looks++
	for name, st := range v.status {
		if !w.sawState[name+st.State] {
			w.sawState[name+st.State] = true
			w.s.l.Note(name, "state", st.State+", "+st.Role+": "+clipText(st.Reason, 300))
		}
		w.judgeRole(name, st.Role)
	}
	growing := v.growing()
	if len(growing) < 2 || w.apart {
		w.two = time.Time{}
	} else {
		if w.two.IsZero() {
			w.two = now
		}
		limit := meetWithin
		if w.s.opts.founding != "first" {
			limit = 0 // never two, in these modes
		}
		since := w.two
		if w.togetherAt.After(since) {
			since = w.togetherAt
		}
		if now.Sub(since) >= limit {
			w.blame("two clusters grow", fmt.Errorf("%d clusters take in nodes: %s", len(growing), strings.Join(growing, ", ")))
		}
	}
	switch n := v.best.voters(); {
	case !v.any || n == 0 || n == 1 || n == 3 || len(v.blockers()) > 0:
		w.even = time.Time{}
	case w.even.IsZero():
		w.even = now
	case now.Sub(w.even) > restless:
		w.blame("voters at rest", fmt.Errorf("%d voters for %v, and no node names a blocker", n, now.Sub(w.even).Round(time.Second)))
	}
	w.last = v
	close(w.news)
	w.news = make(chan struct{})
}

// judgeRole: roles never flip by themselves.
func (w *watch) judgeRole(name, role string) {
	list := w.roles[name]
	if role == "" { // an agent that has just started does not know yet
		return
	}
	if len(list) > 0 && list[len(list)-1] == role {
		return
	}
	if len(list) > 0 {
		w.s.l.Say(name, "role", list[len(list)-1]+" -> "+role)
		if list[len(list)-1] == roleServer && role == roleWorker && !w.demote[name] {
			w.blame("roles of "+name, errors.New("a server became a worker and nothing had happened to it"))
		}
	}
	w.roles[name] = append(list, role)
	if len(list)+1 > maxFlips {
		w.blame("roles of "+name, fmt.Errorf("its role changed all the time: %s", strings.Join(w.roles[name], ", ")))
	}
}

// blame remembers that something was that must never be; mu is held.
func (w *watch) blame(what string, err error) {
	if w.wrong[what] == nil {
		w.wrong[what] = err
		w.s.l.Say("watch", "violated", "MUST NEVER BE: "+what+": "+err.Error())
	}
}

// mayDemote lets nodes go from server to worker from now on: something
// happened to them.
func (w *watch) mayDemote(boxes ...*box) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range boxes {
		w.demote[b.Name()] = true
	}
}

// split and joined tell the watch what the LAN is like.
func (w *watch) split() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.apart = true
}

func (w *watch) joined() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.apart, w.togetherAt = false, time.Now()
}

// now is the last view.
func (w *watch) now() view {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// verdict is nil if nothing was that must never be.
func (w *watch) verdict() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, what := range slices.Sorted(maps.Keys(w.wrong)) {
		errs = append(errs, fmt.Errorf("%s: %w", what, w.wrong[what]))
	}
	if w.looks == 0 {
		errs = append(errs, errors.New("the watch never looked"))
	}
	return errors.Join(errs...)
}

// until waits until a view fits, for at most limit. It ends at once when
// something was that must never be.
func (w *watch) until(ctx context.Context, what string, limit time.Duration, fits func(view) bool) (view, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	for {
		w.mu.Lock()
		v, news, wrong := w.last, w.news, len(w.wrong) > 0
		w.mu.Unlock()
		if wrong {
			return v, fmt.Errorf("%s: %w", what, w.verdict())
		}
		if !v.at.IsZero() && fits(v) {
			return v, nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return v, fmt.Errorf("%s: %w; last seen:\n%s", what, context.Cause(ctx), v)
		}
	}
}

// rests waits for a view that fits and goes on fitting for a while.
func (w *watch) rests(ctx context.Context, what string, limit, quiet time.Duration, fits func(view) bool) (view, error) {
	var since time.Time
	return w.until(ctx, what, limit, func(v view) bool {
		if !fits(v) {
			since = time.Time{}
			return false
		}
		if since.IsZero() {
			since = v.at
		}
		return v.at.Sub(since) >= quiet
	})
}

// table is the live view.
func (w *watch) table(v view) string {
	width := w.s.l.Spec.Width
	if width <= 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s %-11s %-9s %-20s %s\n", "NODE", "STATE", "ROLE", "BLOCKER", "REASON")
	for _, n := range w.s.nodes {
		st, ok := v.status[n.Name()]
		if _, on := n.On(); !on {
			st.State = "off"
		} else if !ok {
			st.State = "no answer"
		}
		fmt.Fprintf(&b, "%-8s %-11s %-9s %-20s %s\n", n.Name(), st.State, st.Role, st.Blocker, strings.ReplaceAll(st.Reason, "\n", " "))
	}
	if v.any {
		fmt.Fprintf(&b, "seen from %s: API %v, %d of %d nodes ready, %d voters, %d learners\n", v.best.From.Name(), v.best.API,
			v.best.ready(), len(v.best.Nodes), v.best.voters(), len(v.best.Members)-v.best.voters())
	}
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	for i, line := range lines {
		if runes := []rune(line); len(runes) > width {
			lines[i] = string(runes[:width])
		}
	}
	return strings.Join(lines, "\n") + "\n"
}
