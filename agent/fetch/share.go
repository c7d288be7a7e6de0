package fetch

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Standing is what a node says of one file: what it has of it and whether it
// is fetching it. It is a hint: digests decide what is believed.
type Standing struct {
	// Have is how many bytes it serves, from the first on, verified.
	Have int64 `json:"have"`
	// Wants: it needs the file, or the rest of it.
	Wants bool `json:"wants,omitempty"`
	// Direct: it asks the centre for it now.
	Direct bool `json:"direct,omitempty"`
	// Got is how far it is, what is not verified yet included.
	Got int64 `json:"got,omitempty"`
}

// Validate reports what cannot be.
func (s Standing) Validate() error {
	if s.Have < 0 || s.Got < 0 || s.Have > maxBlob || s.Got > maxBlob {
		return fmt.Errorf("fetch: a standing of %d and %d bytes", s.Have, s.Got)
	}
	if s.Direct && !s.Wants {
		return errors.New("fetch: a standing that fetches what it does not want")
	}
	return nil
}

// maxBlob is above the largest root of a slot.
const maxBlob = 1 << 40

// Times of Share.
const (
	// shareFresh is how old a standing may be to count.
	shareFresh = 30 * time.Second
	// shareStep is how long each place in the order waits for the one before.
	shareStep = 15 * time.Second
	// slowAfter and slowBytes: who gets less from the centre is passed over.
	slowAfter = time.Minute
	slowBytes = 64 << 10
	// A peer that says it fetches and brings nothing is waited for this long
	// for a piece, and longer for larger ones; then not for idleTalk.
	shareMost = 15 * time.Minute
	shareRate = 2 << 10
	idleTalk  = 4 * time.Hour
	// silentMost times in a row without an answer is away.
	silentMost = 2
)

// Share decides for one node and one file whether it asks the centre itself or
// waits for a peer that does. All nodes of a site follow it, so that one of
// them fetches and the others take it from there. The order is by a hash of
// file and node: another node bears the burden of another file. No lock is
// taken and nothing is promised: when nodes do not see each other, each
// fetches for itself, and when they do again, one of them goes on.
//
// It knows no network and no clock.
type Share struct {
	self string
	key  Digest
	// since is when nobody was seen to fetch for the first time, or when this
	// node asked in vain.
	since time.Time
	// piece is where the piece begins that is waited for; waited is for how
	// long, without what it asked in vain itself, asked when it wanted to know
	// last.
	piece  int64
	waited time.Duration
	asked  time.Time
	direct bool
	mates  map[string]*mate
}

type mate struct {
	Standing
	at     time.Time
	silent int
	// From mark on it got less than slowBytes; graced: it had the time that
	// one gets who begins, and brought nothing yet.
	mark    time.Time
	markGot int64
	graced  bool
	// mine is how far this node was when it heard that.
	mine int64
	// ignored ends an idle talker's say.
	ignored time.Time
	rank    Digest
}

// NewShare begins a fetch of the file by the node self.
func NewShare(now time.Time, self string, file Digest) *Share {
	return &Share{self: self, key: file, since: now, asked: now, piece: -1, mates: map[string]*mate{}}
}

func (s *Share) rank(name string) Digest {
	return sha256.Sum256(append(bytes.Clone(s.key[:]), name...))
}

// Only forgets all mates but these.
func (s *Share) Only(names []string) {
	for n := range s.mates {
		if !slices.Contains(names, n) {
			delete(s.mates, n)
		}
	}
	for _, n := range names {
		if s.mates[n] == nil && len(s.mates) < maxKnown {
			s.mates[n] = &mate{rank: s.rank(n)}
		}
	}
}

// Heard takes what a mate says; pos is how far this node is in this moment.
func (s *Share) Heard(now time.Time, name string, st Standing, pos int64) {
	m := s.mates[name]
	if m == nil {
		return
	}
	switch {
	case st.Got-m.markGot >= slowBytes:
		m.mark, m.markGot, m.graced = now, st.Got, false
	case st.Got < m.markGot:
		m.markGot = st.Got // it began anew
	case st.Direct && !m.graced:
		m.mark, m.markGot, m.graced = now, st.Got, true
	}
	m.Standing, m.at, m.silent, m.mine = st, now, 0, pos
}

// Silent notes that a mate did not answer.
func (s *Share) Silent(name string) {
	if m := s.mates[name]; m != nil {
		m.silent++
	}
}

// Distrust ends a mate's say: it lied.
func (s *Share) Distrust(now time.Time, name string) {
	if m := s.mates[name]; m != nil {
		m.ignored = now.Add(idleTalk)
	}
}

// Known returns what a mate said last; ok is false for one that is away.
func (s *Share) Known(now time.Time, name string) (st Standing, at time.Time, ok bool) {
	m := s.mates[name]
	if m == nil || m.silent >= silentMost || now.Sub(m.at) > shareFresh {
		return Standing{}, time.Time{}, false
	}
	return m.Standing, m.at, true
}

// Answers reports whether a mate answered when it was asked last.
func (s *Share) Answers(name string) bool {
	m := s.mates[name]
	return m != nil && m.silent == 0
}

func (m *mate) counts(now time.Time) bool {
	return m.Wants && m.silent < silentMost && now.Sub(m.at) <= shareFresh && !now.Before(m.ignored)
}

// moves: it fetches from the centre, and gets something.
func (m *mate) moves(now time.Time) bool {
	return m.counts(now) && m.Direct && now.Sub(m.mark) < slowAfter
}

// Direct reports whether this node asks the centre now.
func (s *Share) Direct() bool { return s.direct }

// Takes notes that this node takes the next bytes from a peer.
func (s *Share) Takes() { s.direct = false }

// MayAsk says whether this node may ask the centre for the piece of size bytes
// at off.
func (s *Share) MayAsk(now time.Time, off, size int64) (ok bool, why string) {
	if off != s.piece {
		s.piece, s.waited, s.asked = off, 0, now
	}
	since := min(now.Sub(s.asked), shareStep)
	s.asked = now
	if name, yes := s.ahead(now); yes {
		if s.waited += since; s.waited <= shareMost+time.Duration(size/shareRate)*time.Second {
			s.direct, s.since = false, now
			return false, name + " is fetching it from the centre"
		}
		// It talks and brings nothing.
		s.mates[name].ignored = now.Add(idleTalk)
	}
	if s.direct {
		s.waited = 0
		return true, ""
	}
	// Nobody who counts is fetching. The one that is furthest does, so that
	// nothing is fetched twice; each further one a step later.
	before, first := 0, ""
	for n, m := range s.mates {
		if m.counts(now) && (m.Got > m.mine || m.Got == m.mine && s.outranked(m)) {
			if before++; first == "" || n < first {
				first = n
			}
		}
	}
	if left := s.since.Add(time.Duration(before) * shareStep).Sub(now); left > 0 {
		return false, fmt.Sprintf("%s is to ask the centre before this node", first)
	}
	s.direct, s.waited = true, 0
	return true, ""
}

// outranked reports whether m comes before this node in the order.
func (s *Share) outranked(m *mate) bool {
	mine := s.rank(s.self)
	return bytes.Compare(m.rank[:], mine[:]) < 0
}

// clearly is how much further one must be to fetch on although it comes later
// in the order.
const clearly = 1 << 20

// ahead names a mate that fetches and for whom this node stands back: any, if
// this node does not fetch; else one that is clearly further, or before it in
// order and not clearly behind. What is compared is of one moment, so that
// never both stand back.
func (s *Share) ahead(now time.Time) (string, bool) {
	first := ""
	for n, m := range s.mates {
		if !m.moves(now) {
			continue
		}
		lead := m.Got - m.mine
		if (!s.direct || lead > clearly || lead >= -clearly && s.outranked(m)) && (first == "" || n < first) {
			first = n
		}
	}
	return first, first != ""
}

// Yield says whether this node, which fetches, stops because a mate fetches
// the same.
func (s *Share) Yield(now time.Time) (why string, yes bool) {
	name, yes := s.ahead(now)
	if !s.direct || !yes {
		return "", false
	}
	return name + " fetches the same from the centre", true
}

// Vain notes that the centre gave nothing: somebody else may try.
func (s *Share) Vain(now time.Time) { s.direct, s.since, s.waited = false, now, 0 }
