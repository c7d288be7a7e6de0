package server

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/pxe"
)

const (
	// maxMachines bounds the table: MAC addresses are free to invent.
	maxMachines = 4096
	// repeatAfter is how long the same sentence about the same machine is
	// not said again.
	repeatAfter = time.Minute
	// maxLearnt bounds what is read from disk.
	maxLearnt = 1 << 20
	// refusalBurst and refusalEvery bound the lines about refused machines:
	// a flood of invented MACs must not bury what matters.
	refusalBurst = 60
	refusalEvery = time.Second
	// lineBurst and lineEvery bound the lines about one machine, which may
	// ask for a byte of the image a thousand times a second; a boot has ten.
	lineBurst = 60
	lineEvery = 10 * time.Second
	// allBurst and allEvery bound the lines about all machines together,
	// alarms aside: MAC addresses are free to invent.
	allBurst = 3000
	allEvery = 200 * time.Millisecond
)

// Status is a machine as the boot host knows it.
type Status struct {
	pxe.Machine
	State pxe.State  `json:"state"`
	Addr  netip.Addr `json:"addr,omitzero"`
	Seen  time.Time  `json:"seen"`
	// Sent and Size are bytes of the image being fetched.
	Sent int64  `json:"sent,omitempty"`
	Size int64  `json:"size,omitempty"`
	Text string `json:"text"`
}

type machine struct {
	Status
	ladder pxe.Ladder
	// window is the number of the operator's window it was counted in.
	window int
	begun  time.Time
	said   time.Time
	lines  bucket
	// home: it has called home since we started.
	home bool
	// tlsOffered is when it was last given an https URL, plain is true once
	// it came back without having fetched that.
	tlsOffered time.Time
	plain      bool
}

const (
	// sameRound is within which a further DISCOVER is a repetition.
	sameRound = 2 * time.Second
	// plainFor is how long a machine that did not fetch by HTTPS is given
	// plain URLs; then its firmware may have been set right.
	plainFor = 10 * time.Minute
)

// untrusting reports whether the machine has just been given an https URL and
// asks again without having fetched it. EDK2 says nothing to a server whose
// certificate it does not trust, or that it takes for expired.
func (e *machine) untrusting(now time.Time, t pxe.MessageType) bool {
	since := now.Sub(e.tlsOffered)
	switch {
	case e.tlsOffered.IsZero() || since < 0 || since >= plainFor:
		e.plain = false
	case t == pxe.Discover && since >= sameRound:
		e.plain = true
	}
	return e.plain
}

// bucket bounds lines. The zero value is full.
type bucket struct {
	spent int
	at    time.Time
	// unsaid counts lines that found it empty.
	unsaid int
}

// take reports whether one more line may be told, and how many were kept back
// before it.
func (b *bucket) take(now time.Time, burst int, every time.Duration) (unsaid int, ok bool) {
	if n := now.Sub(b.at).Abs() / every; n > 0 || b.at.IsZero() {
		b.spent = max(0, b.spent-int(min(n, time.Duration(burst))))
		b.at = now
	}
	if b.spent >= burst {
		b.unsaid++
		return 0, false
	}
	b.spent++
	unsaid, b.unsaid = b.unsaid, 0
	return unsaid, true
}

// machines is what is known of each MAC, bounded.
type machines struct {
	path string
	log  *slog.Logger

	mu     sync.Mutex
	byMAC  map[pxe.MAC]*machine
	byAddr map[netip.Addr]pxe.MAC
	window pxe.Window
	// number counts windows, so that who was let in by an old one is not
	// taken as let in by the new.
	number int
	dirty  bool
	// refusals are lines about refused machines, all those about any.
	refusals, all bucket
}

func newMachines(dir string, log *slog.Logger) *machines {
	m := &machines{log: log, byMAC: map[pxe.MAC]*machine{}, byAddr: map[netip.Addr]pxe.MAC{}}
	if dir != "" {
		m.path = filepath.Join(dir, "firmware.json")
		m.load()
	}
	return m
}

// get returns mac's entry, making room if needed. The caller holds mu.
func (m *machines) get(now time.Time, mac pxe.MAC) *machine {
	e, ok := m.byMAC[mac]
	if !ok {
		if len(m.byMAC) >= maxMachines {
			m.evict()
		}
		e = &machine{Status: Status{Machine: pxe.Machine{MAC: mac}}}
		m.byMAC[mac] = e
	}
	e.Seen = now
	return e
}

// evict forgets the machine heard of longest ago, preferring ones that never
// got anywhere.
func (m *machines) evict() {
	var worst *machine
	for _, e := range m.byMAC {
		if worst == nil || rank(e) < rank(worst) || rank(e) == rank(worst) && e.Seen.Before(worst.Seen) {
			worst = e
		}
	}
	if worst != nil {
		delete(m.byMAC, worst.MAC)
		delete(m.byAddr, worst.Addr)
	}
}

// rank orders machines by what they have shown: a flood of invented ones must
// not push out those that have fetched the image, or what was learnt of them.
func rank(e *machine) int {
	switch {
	case e.home:
		return 3
	case e.ladder.Worked:
		return 2
	case e.State == pxe.StateSeen, e.State == pxe.StateRefused:
		return 0
	}
	return 1
}

// at records that e has address a.
func (m *machines) at(e *machine, a netip.Addr) {
	if !a.IsValid() || e.Addr == a {
		return
	}
	delete(m.byAddr, e.Addr)
	e.Addr = a
	m.byAddr[a] = e.MAC
}

// learnt is the file of rungs that worked: without it a firmware that needs
// port 4011 would cost one more round after every restart.
type learnt struct {
	Format string               `json:"format"`
	Rungs  map[pxe.MAC]pxe.Rung `json:"rungs"`
}

const learntFormat = "muster/boot-firmware/v1"

func (m *machines) load() {
	st, err := os.Stat(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var l learnt
	if err == nil && st.Size() > maxLearnt {
		err = errors.New("file is too large")
	}
	if err == nil {
		var b []byte
		if b, err = os.ReadFile(m.path); err == nil {
			err = json.Unmarshal(b, &l)
		}
	}
	if err != nil || l.Format != learntFormat {
		m.log.Warn("what was learnt of firmware is not read; it will be learnt again", "path", m.path, "error", err)
		return
	}
	for mac, r := range l.Rungs {
		if len(m.byMAC) < maxMachines && r == pxe.RungBINL {
			m.byMAC[mac] = &machine{Status: Status{Machine: pxe.Machine{MAC: mac}}, ladder: pxe.Ladder{Start: r, Worked: true}}
		}
	}
}

// save writes the file if something was learnt.
func (m *machines) save() {
	m.mu.Lock()
	l := learnt{Format: learntFormat, Rungs: map[pxe.MAC]pxe.Rung{}}
	for mac, e := range m.byMAC {
		if e.ladder.Worked && e.ladder.Start != pxe.RungDirect {
			l.Rungs[mac] = e.ladder.Start
		}
	}
	write := m.dirty && m.path != ""
	m.dirty = false
	m.mu.Unlock()
	if !write {
		return
	}
	b, err := json.Marshal(l)
	if err == nil {
		err = renameio.WriteFile(m.path, b, 0o600)
	}
	if err != nil {
		m.log.Warn("what was learnt of firmware is not kept", "path", m.path, "error", err)
	}
}
