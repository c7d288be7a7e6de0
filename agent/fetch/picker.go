package fetch

import (
	"fmt"
	"time"
)

// Outcome is how one request ended.
type Outcome uint8

const (
	// Progress: bytes came before it ended, however it ended.
	Progress Outcome = iota
	// Little: some bytes came, and others should be asked before it again.
	Little
	// Nothing: no byte came.
	Nothing
	// Missing: the source says that it does not have the file.
	Missing
	// Lied: a chunk that came from this source alone is not what was asked for.
	Lied
)

var outcomeNames = [...]string{"progress", "little", "nothing", "missing", "lied"}

// String returns the outcome in a word.
func (o Outcome) String() string {
	if int(o) < len(outcomeNames) {
		return outcomeNames[o]
	}
	return fmt.Sprintf("outcome(%d)", uint8(o))
}

// Pauses before a source is asked again.
const (
	pauseFirst = time.Second
	pauseMost  = time.Minute
	// A source without the file may get it: peers fetch, too.
	pauseMissing = 30 * time.Second
	// A lie can be a broken memory module; it is asked again after long.
	pauseLie     = 10 * time.Minute
	pauseLieMost = 4 * time.Hour
)

// standing is what is known of one source.
type standing struct {
	failures, lies int
	until          time.Time
	why            string
}

// Picker says whom to ask. Names are given in the order of preference with
// each call: a node's peers, which cost no WAN, come before the centre.
type Picker struct {
	known map[string]*standing
}

func (p *Picker) of(name string) *standing {
	if p.known == nil {
		p.known = map[string]*standing{}
	}
	s := p.known[name]
	if s == nil {
		// Names come from the site's documents; all the same they are bounded.
		if len(p.known) > maxKnown {
			clear(p.known)
		}
		s = &standing{}
		p.known[name] = s
	}
	return s
}

const maxKnown = 256

// Pick returns the index of the source to ask now. ok is false when none may
// be asked: then wait says how long, and why says what is the matter.
func (p *Picker) Pick(now time.Time, names []string) (i int, wait time.Duration, why string, ok bool) {
	why = "nobody is known who could have the file"
	soonest := time.Duration(-1)
	for i, n := range names {
		s := p.of(n)
		if !s.until.After(now) {
			return i, 0, "", true
		}
		// Also of one that is not asked for long, such as a liar: it may be the
		// only one, and a person must hear what is the matter with it.
		if left := s.until.Sub(now); soonest < 0 || left < soonest {
			soonest, why = left, n+": "+s.why
		}
	}
	if wait = pauseMost; soonest >= 0 {
		wait = min(wait, soonest)
	}
	return -1, wait, why, false
}

// Note remembers how a request to name ended. random is in [0, 1): sites whose
// line comes back together must not ask together.
func (p *Picker) Note(now time.Time, name string, o Outcome, why string, random float64) {
	s := p.of(name)
	s.why = why
	switch o {
	case Progress:
		s.failures, s.until = 0, now
	case Little:
		s.failures, s.until = 0, now.Add(pauseFirst)
	case Nothing:
		pause := min(pauseFirst<<min(s.failures, 10), pauseMost)
		s.failures++
		s.until = now.Add(pause/2 + time.Duration(random*float64(pause/2)))
	case Missing:
		s.until = now.Add(pauseMissing)
	case Lied:
		s.until = now.Add(min(pauseLie<<min(s.lies, 10), pauseLieMost))
		s.lies++
	}
}

// Lies returns how often a source lied.
func (p *Picker) Lies(name string) int { return p.of(name).lies }
