package fetch

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Mate is a peer of the site: a source that also says what it has.
type Mate interface {
	Source
	Standing(ctx context.Context, file Digest) (Standing, error)
}

// MaxStanding bounds a Standing as JSON.
const MaxStanding = 256

// ParseStanding reads what a peer says. Unknown fields are of newer peers.
func ParseStanding(b []byte) (Standing, error) {
	var s Standing
	if len(b) > MaxStanding {
		return s, fmt.Errorf("fetch: a standing of %d bytes", len(b))
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return Standing{}, fmt.Errorf("fetch: read a standing: %w", err)
	}
	if err := s.Validate(); err != nil {
		return Standing{}, err
	}
	return s, nil
}

// Pauses between two questions to one mate, and how long it may think.
const (
	lookOften = time.Second
	lookAway  = 10 * time.Second
	lookTime  = 3 * time.Second
	// While this node's own transfer is young, somebody else may have begun in
	// the same moment.
	watchYoung = 500 * time.Millisecond
	youngFor   = 5 * time.Second
	watchOld   = 5 * time.Second
	// askedFresh is how long a mate that asked counts as one that takes from
	// this node, askedMost for how long in all.
	askedFresh = 20 * time.Second
	askedMost  = time.Hour
	// lingers is how long a file may take from its last byte to the disk.
	lingers = 30 * time.Second
)

// Team is what the fetches of one node have in common: who the mates are, and
// what mates are told about the fetches. It may be used by many.
type Team struct {
	// Self is this node's name; all nodes of the site call it so.
	Self string
	// Mates are those that can be asked now.
	Mates func() []Mate

	mu    sync.Mutex
	wants map[Digest]*want
	ended map[Digest]ended
	asked map[Digest]asked
}

// ended is a fetch from the centre that is over: until what came is on the
// disk and served, mates shall not begin.
type ended struct {
	at  time.Time
	got int64
}

type asked struct{ first, last time.Time }

// want is one fetch of one file.
type want struct {
	team  *Team
	file  Digest
	users int

	mu     sync.Mutex
	share  *Share
	got    int64
	looked map[string]time.Time
}

// begin registers a fetch; mates see it from now on.
func (t *Team) begin(file Digest) *want {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.wants[file]
	if w == nil {
		w = &want{team: t, file: file, share: NewShare(time.Now(), t.Self, file), looked: map[string]time.Time{}}
		if t.wants == nil {
			t.wants = map[Digest]*want{}
		}
		t.wants[file] = w
	}
	w.users++
	return w
}

func (w *want) end() {
	w.team.mu.Lock()
	defer w.team.mu.Unlock()
	if w.users--; w.users > 0 {
		return
	}
	t := w.team
	delete(t.wants, w.file)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.share.Direct() {
		if t.ended == nil || len(t.ended) > maxKnown {
			t.ended = map[Digest]ended{}
		}
		t.ended[w.file] = ended{time.Now(), w.got}
	}
}

// Standing is what a mate is told about this node's own fetch of a file; Have
// is for who keeps files.
func (t *Team) Standing(file Digest) Standing {
	t.mu.Lock()
	w, e := t.wants[file], t.ended[file]
	t.mu.Unlock()
	if w == nil {
		if over := !e.at.IsZero() && time.Since(e.at) < lingers; over {
			return Standing{Wants: true, Direct: true, Got: e.got}
		}
		return Standing{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return Standing{Wants: true, Direct: w.share.Direct(), Got: w.got}
}

// Asked notes that a mate asked for a file that is here.
func (t *Team) Asked(now time.Time, file Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.asked == nil || len(t.asked) > maxKnown {
		t.asked = map[Digest]asked{}
	}
	a := t.asked[file]
	if a.first.IsZero() {
		a.first = now
	}
	a.last = now
	t.asked[file] = a
}

// Serving reports whether mates are taking files from this node. It ends by
// itself after an hour of the same file: nobody holds a node up for ever.
func (t *Team) Serving(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range t.asked {
		if now.Sub(a.last) < askedFresh && now.Sub(a.first) < askedMost {
			return true
		}
	}
	return false
}

// look asks the mates whose last answer is old; all is for those with any.
func (w *want) look(ctx context.Context, all bool) []Mate {
	mates := w.team.Mates()
	names := make([]string, len(mates))
	for i, m := range mates {
		names[i] = m.Name()
	}
	now := time.Now()
	var due []Mate
	w.mu.Lock()
	w.share.Only(names)
	for n := range w.looked {
		if !slices.Contains(names, n) {
			delete(w.looked, n)
		}
	}
	for _, m := range mates {
		// Those that bring something are looked at often; a large site asks
		// the others less.
		every := lookOften * time.Duration(max(2, len(mates)/4))
		if st, _, ok := w.share.Known(now, m.Name()); all || ok && (st.Direct || st.Have > 0) {
			every = lookOften
		}
		if !w.share.Answers(m.Name()) {
			every = lookAway
		}
		if at, ok := w.looked[m.Name()]; ok && now.Sub(at) < every {
			continue
		}
		w.looked[m.Name()] = now
		due = append(due, m)
	}
	w.mu.Unlock()
	w.ask(ctx, due)
	return mates
}

// ask puts the question to mates at once. Who did not answer the last time is
// not waited for.
func (w *want) ask(ctx context.Context, due []Mate) {
	var wg sync.WaitGroup
	for _, m := range due {
		w.mu.Lock()
		answers := w.share.Answers(m.Name())
		w.mu.Unlock()
		one := func() {
			actx, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			st, err := m.Standing(actx, w.file)
			w.mu.Lock()
			defer w.mu.Unlock()
			switch {
			case err == nil && st.Validate() == nil:
				w.share.Heard(time.Now(), m.Name(), st, w.got)
			case ctx.Err() == nil:
				w.share.Silent(m.Name())
			}
		}
		if answers {
			wg.Go(one)
		} else {
			go one()
		}
	}
	wg.Wait()
}

// at notes how far the fetch is.
func (w *want) at(pos int64) {
	if w == nil {
		return
	}
	w.mu.Lock()
	w.got = pos
	w.mu.Unlock()
}

// whoHas returns the mates with bytes beyond pos, in an order of this node's
// own, so that not all ask the same.
func (w *want) whoHas(mates []Mate, pos int64) []Mate {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	type ranked struct {
		Mate
		rank Digest
	}
	var out []ranked
	for _, m := range mates {
		if st, _, ok := w.share.Known(now, m.Name()); ok && st.Have > pos {
			out = append(out, ranked{m, w.share.rank(w.team.Self + "\x00" + m.Name())})
		}
	}
	slices.SortFunc(out, func(a, b ranked) int { return bytes.Compare(a.rank[:], b.rank[:]) })
	list := make([]Mate, len(out))
	for i, r := range out {
		list[i] = r.Mate
	}
	return list
}

// errYield ends a transfer from the centre that a mate does as well.
type errYield struct{ why string }

func (e errYield) Error() string { return e.why }

// watch looks while this node fetches from the centre, and ends the transfer
// when a mate is further.
func (w *want) watch(ctx context.Context, stop context.CancelCauseFunc) {
	began := time.Now()
	for {
		pause := watchOld
		if time.Since(began) < youngFor {
			pause = watchYoung
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		var due []Mate
		mates := w.team.Mates()
		w.mu.Lock()
		for _, m := range mates {
			if st, _, ok := w.share.Known(time.Now(), m.Name()); ok && (st.Wants || time.Since(began) < youngFor) {
				due = append(due, m)
			}
		}
		w.mu.Unlock()
		w.ask(ctx, due)
		w.mu.Lock()
		why, yes := w.share.Yield(time.Now())
		w.mu.Unlock()
		if yes {
			stop(errYield{why})
			return
		}
	}
}
