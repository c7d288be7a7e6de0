package ether

import (
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"
	"time"
)

// Config describes a switch. The zero value is a good one.
type Config struct {
	// Seed decides which frames suffer.
	Seed uint64
	// Queue is how many frames may wait at a port; more are dropped and
	// counted. 2,000 if 0.
	Queue int
	// Watch, if given, is called for every frame at a port's end of the
	// cable: in as the station sent it, out as it gets it. It must not keep
	// the frame and not call the switch.
	Watch func(port string, in bool, frame []byte)
}

const (
	// MaxFrame is the longest frame taken, in bytes; longer ones are dropped.
	MaxFrame = 9216
	// maxPorts and maxAddresses bound what stations can make a switch keep.
	maxPorts     = 256
	maxAddresses = 4096
	defaultQueue = 2000
)

// drop is why a way let a frame not through.
type drop int

const (
	dropNot drop = iota
	dropLoss
	dropCut
	dropMulticast
)

// Counters of one port. Frames are counted at the port's end of the cable.
type Counters struct {
	// In and Out are frames from and to the station.
	In, Out           uint64
	InBytes, OutBytes uint64
	// Group are those of them to group addresses, broadcasts included.
	InGroupBytes, OutGroupBytes uint64
	// The rest counts frames on their way to this port, and on its cable on
	// their way from it: why they were not delivered, or what else befell them.
	Lost, Cut, Multicast, Dark, Partition, Queue, Size uint64
	Doubled, Overtaken                                 uint64
}

// Switch forwards frames between its ports. Its methods may be called from
// any goroutine.
type Switch struct {
	cfg Config

	mu     sync.Mutex
	ports  map[string]*port
	ways   map[[2]string]*way // by sender and receiver
	sides  map[string]int     // partition: side of a port, from 1
	where  map[[6]byte]string // learned addresses
	closed bool
}

// port is one station's connection.
type port struct {
	name    string
	station io.ReadWriteCloser
	in, out *way // the cable's faults, by direction as the station sees it
	dark    bool
	until   time.Time // of dark; zero: until told otherwise
	queue   queue
	count   Counters
	capture *capture
	done    chan struct{}
	ended   sync.WaitGroup
}

// New returns a switch without ports.
func New(cfg Config) *Switch {
	if cfg.Queue == 0 {
		cfg.Queue = defaultQueue
	}
	return &Switch{cfg: cfg, ports: map[string]*port{}, ways: map[[2]string]*way{}, sides: map[string]int{}, where: map[[6]byte]string{}}
}

// Attach plugs a station in. The switch reads and writes one frame per call
// and closes the station when it is detached. A port that was there before
// keeps its faults; its counters go on.
func (s *Switch) Attach(name string, station io.ReadWriteCloser) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.ports[name]
	switch {
	case s.closed:
		return errors.New("ether: attach " + name + ": the switch is closed")
	case old != nil && old.station != nil:
		return errors.New("ether: attach " + name + ": the port is taken")
	case old == nil && len(s.ports) >= maxPorts:
		return fmt.Errorf("ether: attach %s: there are %d ports", name, maxPorts)
	}
	p := &port{name: name, station: station, done: make(chan struct{})}
	if old != nil {
		p.in, p.out, p.dark, p.until, p.count, p.capture = old.in, old.out, old.dark, old.until, old.count, old.capture
	} else {
		p.in, p.out = newWay(s.cfg.Seed, name+" in"), newWay(s.cfg.Seed, name+" out")
	}
	p.queue.wake = make(chan struct{}, 1)
	s.ports[name] = p
	p.ended.Add(2)
	go func() { defer p.ended.Done(); s.receive(p, station) }()
	go func() { defer p.ended.Done(); s.send(p, station) }()
	return nil
}

// Detach pulls a station's plug and closes it. Faults, counters and capture
// of the port stay for who is attached next. It is no error if nobody is
// there.
func (s *Switch) Detach(name string) error {
	s.mu.Lock()
	p := s.ports[name]
	if p == nil || p.station == nil {
		s.mu.Unlock()
		return nil
	}
	station := p.station
	p.station = nil
	p.queue.items = nil
	close(p.done)
	for mac, at := range s.where {
		if at == name {
			delete(s.where, mac)
		}
	}
	s.mu.Unlock()
	err := station.Close()
	p.ended.Wait()
	if err != nil {
		return fmt.Errorf("ether: detach %s: %w", name, err)
	}
	return nil
}

// Close detaches every port and ends captures.
func (s *Switch) Close() error {
	s.mu.Lock()
	s.closed = true
	var names []string
	for name := range s.ports {
		names = append(names, name)
	}
	s.mu.Unlock()
	var errs []error
	for _, name := range names {
		errs = append(errs, s.Detach(name), s.Capture(name, nil))
	}
	return errors.Join(errs...)
}

// receive takes frames from a station until it ends.
func (s *Switch) receive(p *port, station io.Reader) {
	buf := make([]byte, 64<<10)
	for {
		n, err := station.Read(buf)
		if err != nil {
			return
		}
		s.forward(p, buf[:n], time.Now())
	}
}

// forward decides about one frame from a port.
func (s *Switch) forward(p *port, frame []byte, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.station == nil || len(frame) < 14 {
		return
	}
	if len(frame) > MaxFrame {
		p.count.Size++
		return
	}
	if p.isDark(now) {
		p.count.Dark++ // the station's side sees no link; it still may send
		return
	}
	group := frame[0]&1 == 1
	broadcast := group && [6]byte(frame[:6]) == [6]byte{255, 255, 255, 255, 255, 255}
	p.count.In++
	p.count.InBytes += uint64(len(frame))
	if group {
		p.count.InGroupBytes += uint64(len(frame))
	}
	p.capture.add(now, frame)
	if s.cfg.Watch != nil {
		s.cfg.Watch(p.name, true, frame)
	}
	if src := [6]byte(frame[6:12]); src[0]&1 == 0 {
		if _, known := s.where[src]; known || len(s.where) < maxAddresses {
			s.where[src] = p.name
		}
	}
	// What happens on the sender's cable happens once, whoever is to get it.
	sent := p.in.throw(now, len(frame), group, broadcast)
	if sent.drop != dropNot {
		p.count.refuse(sent.drop)
		return
	}
	if to, known := s.where[[6]byte(frame[:6])]; known && !group {
		if q := s.ports[to]; q != p && q != nil && q.station != nil {
			s.pass(p, q, frame, sent, group, broadcast)
		}
		return
	}
	// In the order of names, so that each pair's dice are thrown in the order
	// of frames whatever the map's order is.
	for _, q := range s.others(p) {
		s.pass(p, q, frame, sent, group, broadcast)
	}
}

func (c *Counters) refuse(why drop) {
	switch why {
	case dropLoss:
		c.Lost++
	case dropCut:
		c.Cut++
	case dropMulticast:
		c.Multicast++
	}
}

func (s *Switch) others(p *port) []*port {
	out := make([]*port, 0, len(s.ports))
	for _, q := range s.ports {
		if q != p && q.station != nil {
			out = append(out, q)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

func (p *port) isDark(now time.Time) bool {
	return p.dark && (p.until.IsZero() || now.Before(p.until))
}

// pass sends a frame that has passed p's cable over what lies between p and q
// and over q's cable.
func (s *Switch) pass(p, q *port, frame []byte, sent fate, group, broadcast bool) {
	c := &q.count
	if q.isDark(sent.due) {
		c.Dark++
		return
	}
	if a, b := s.sides[p.name], s.sides[q.name]; a != 0 && b != 0 && a != b {
		c.Partition++
		return
	}
	due, copies, overtaken := sent.due, 1, sent.overtake
	if sent.again {
		copies++
	}
	between := s.way(p.name, q.name)
	for _, w := range []*way{between, q.out} {
		f := w.throw(due, len(frame), group, broadcast)
		if f.drop != dropNot {
			c.refuse(f.drop)
			return
		}
		due = f.due
		if f.again {
			copies++
		}
		overtaken = overtaken || f.overtake
	}
	if copies > 1 {
		c.Doubled++
	}
	switch {
	case overtaken:
		c.Overtaken++
	case due.Before(between.last):
		due = between.last // jitter alone changes no order
	default:
		between.last = due
	}
	text := append([]byte(nil), frame...)
	for range copies {
		if q.queue.len() >= s.cfg.Queue {
			c.Queue++
			return
		}
		q.queue.push(due, text)
	}
}

func (s *Switch) way(from, to string) *way {
	k := [2]string{from, to}
	w := s.ways[k]
	if w == nil {
		w = newWay(s.cfg.Seed, from+" > "+to)
		s.ways[k] = w
	}
	return w
}

// send writes a port's frames when they are due.
func (s *Switch) send(p *port, station io.Writer) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		s.mu.Lock()
		frame, wait, ok := p.queue.pop(time.Now())
		if ok {
			if p.isDark(time.Now()) {
				p.count.Dark++
				s.mu.Unlock()
				continue
			}
			p.count.Out++
			p.count.OutBytes += uint64(len(frame))
			if frame[0]&1 == 1 {
				p.count.OutGroupBytes += uint64(len(frame))
			}
			p.capture.add(time.Now(), frame)
			if s.cfg.Watch != nil {
				s.cfg.Watch(p.name, false, frame)
			}
		}
		s.mu.Unlock()
		if ok {
			// A station that is not up refuses frames; it misses them.
			_, _ = station.Write(frame)
			continue
		}
		timer.Reset(wait)
		select {
		case <-p.queue.wake:
		case <-timer.C:
		case <-p.done:
			return
		}
	}
}
