package server

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/httpboot"
	"github.com/muster-edge/muster/pxe/tftp"
)

// OpenWindow lets count unknown machines boot in proxy mode until a time. It
// replaces an open window; a restart closes it.
func (s *Server) OpenWindow(until time.Time, count int) {
	s.machines.mu.Lock()
	defer s.machines.mu.Unlock()
	s.machines.number++
	s.machines.window = pxe.Window{Until: until, Left: count}
}

// CloseWindow ends the window.
func (s *Server) CloseWindow() { s.OpenWindow(time.Time{}, 0) }

// Window returns the window as it is now.
func (s *Server) Window() pxe.Window {
	s.machines.mu.Lock()
	defer s.machines.mu.Unlock()
	return s.machines.window
}

// CalledHome records that the recovery image on this machine has reached the
// centre.
func (s *Server) CalledHome(mac pxe.MAC) {
	s.machines.mu.Lock()
	s.machines.get(s.cfg.Now(), mac).home = true
	s.machines.mu.Unlock()
	s.step(mac, netip.Addr{}, pxe.StateCalledHome, false, "the recovery image has called home")
}

// Machines returns what is known, in no order.
func (s *Server) Machines() []Status {
	s.machines.mu.Lock()
	defer s.machines.mu.Unlock()
	out := make([]Status, 0, len(s.machines.byMAC))
	for _, e := range s.machines.byMAC {
		if !e.Seen.IsZero() {
			out = append(out, e.Status)
		}
	}
	return out
}

// Known implements dhcp.Decider: the operator's machines, and those that have
// called home.
func (s *Server) Known(mac pxe.MAC) bool {
	s.machines.mu.Lock()
	e, ok := s.machines.byMAC[mac]
	known := ok && e.home
	s.machines.mu.Unlock()
	if known {
		return true
	}
	d := s.cfg.Policy.For(context.Background(), pxe.Machine{MAC: mac})
	return d.Known || d.Standing == pxe.Recover || d.Standing == pxe.Healthy
}

// Decide implements dhcp.Decider.
func (s *Server) Decide(ctx context.Context, now time.Time, req pxe.Request, stopped string) pxe.Reply {
	who := req.Machine()
	d := s.cfg.Policy.For(ctx, who)
	pol := pxe.Policy{Mode: s.cfg.Mode, Standing: d.Standing, Why: d.Reason, Stopped: stopped, Server: s.server}
	if who.Class != pxe.ClassHost && d.Standing != pxe.Denied {
		pol.Images = s.images()
		if s.http != nil {
			pol.HTTPPort = s.http.Addr().Port()
		}
		if s.https != nil {
			pol.HTTPSPort, pol.HTTPSOnly = s.https.Addr().Port(), s.cfg.HTTPSOnly
		}
	}
	m := s.machines
	m.mu.Lock()
	if e, ok := m.byMAC[req.MAC]; ok {
		pol.Ladder = e.ladder
		pol.Untrusting = e.untrusting(now, req.Type)
		pol.Admitted = e.window != 0 && e.window == m.number && now.Before(m.window.Until)
	}
	pol.Window = m.window
	rep := pxe.Decide(now, req, pol)
	if rep.Quiet && rep.Verb == pxe.Silent && !rep.Alarm {
		m.mu.Unlock()
		return rep
	}
	e := m.get(now, req.MAC)
	if who.Class != pxe.ClassHost {
		e.Machine = who
	}
	e.ladder = rep.Ladder
	if req.Type == pxe.Discover && strings.HasPrefix(rep.Boot.File, "https://") && !e.tlsOffered.After(now.Add(-sameRound)) {
		e.tlsOffered, e.plain = now, false
	}
	if rep.Counts {
		m.window.Left--
		e.window = m.number
	}
	m.mu.Unlock()
	if rep.Verb == pxe.Silent {
		s.step(req.MAC, netip.Addr{}, rep.Step, rep.Alarm, rep.Reason)
	}
	return rep
}

// Answered implements dhcp.Decider.
func (s *Server) Answered(now time.Time, req pxe.Request, rep pxe.Reply, kind pxe.MessageType, ip netip.Addr) {
	switch {
	case kind == pxe.Nak:
		s.log.Info("address refused", "mac", req.MAC, "address", req.RequestedIP)
	case rep.Verb == pxe.Lease && kind == pxe.Ack && ip.IsValid():
		// An operating system: if it is the image we sent, say so.
		s.machines.mu.Lock()
		e := s.machines.get(now, req.MAC)
		s.machines.at(e, ip)
		state := e.State
		s.machines.mu.Unlock()
		if state == pxe.StateServed {
			s.step(req.MAC, ip, state, false, "the image is running and has taken an address")
		}
	case rep.Verb == pxe.Lease || req.Type == pxe.Inform:
	case kind == pxe.Ack && rep.Verb == pxe.LeaseBoot:
		s.step(req.MAC, ip, pxe.StateBound, false, "has taken the offer")
	default:
		s.step(req.MAC, ip, rep.Step, false, rep.Reason)
	}
}

// Event implements dhcp.Decider.
func (s *Server) Event(e pxe.Event) {
	if s.cfg.Events != nil {
		s.cfg.Events.Event(e)
	}
}

// step moves a machine and says so, once a minute at most for the same words.
func (s *Server) step(mac pxe.MAC, addr netip.Addr, to pxe.State, alarm bool, text string) {
	now := s.cfg.Now()
	m := s.machines
	m.mu.Lock()
	e := m.get(now, mac)
	m.at(e, addr)
	if e.State != to {
		next, err := e.State.MoveTo(to)
		if err != nil {
			// What a client can do out of order is no error of ours: it is
			// a new boot.
			s.log.Debug("machine jumped", "mac", mac, "error", err)
			next = to
		}
		e.State = next
	} else if e.Text == text && now.Sub(e.said) < repeatAfter {
		m.mu.Unlock()
		return
	}
	e.Text, e.said = text, now
	if !alarm {
		more, ok := m.mayTell(now, e, to)
		if !ok {
			m.mu.Unlock()
			return
		}
		text += more
	}
	ev := pxe.Event{Time: now, MAC: mac, UUID: e.UUID, Arch: e.Arch, Addr: e.Addr, Step: to, Alarm: alarm, Text: text}
	m.mu.Unlock()
	s.Event(ev)
}

// mayTell reports whether a line about e may be told now, and what to add to
// it. The caller holds mu.
func (m *machines) mayTell(now time.Time, e *machine, to pxe.State) (more string, ok bool) {
	unsaid, ok := e.lines.take(now, lineBurst, lineEvery)
	if !ok {
		return "", false
	}
	if unsaid > 0 {
		more = fmt.Sprintf(" (and %d more lines about it, not shown)", unsaid)
	}
	if to == pxe.StateRefused {
		if unsaid, ok = m.refusals.take(now, refusalBurst, refusalEvery); !ok {
			return "", false
		}
		if unsaid > 0 {
			more += fmt.Sprintf(" (and %d more machines refused, not shown)", unsaid)
		}
	}
	if unsaid, ok = m.all.take(now, allBurst, allEvery); unsaid > 0 {
		more += fmt.Sprintf(" (and %d more lines about all machines, not shown)", unsaid)
	}
	return more, ok
}

func (s *Server) mayTellOfStranger() bool {
	s.machines.mu.Lock()
	defer s.machines.mu.Unlock()
	_, ok := s.machines.all.take(s.cfg.Now(), allBurst, allEvery)
	return ok
}

// fetch is what both file servers report.
type fetch struct {
	client     netip.Addr
	by, name   string
	sent, size int64
	done       bool
	probe      bool
	err        error
}

func (s *Server) tftpProgress(p tftp.Progress) {
	s.fetched(fetch{p.Client, "tftp", p.Name, p.Sent, p.Size, p.Done, p.Probe, p.Err})
}

func (s *Server) httpProgress(p httpboot.Progress) { s.webProgress("http", p) }

func (s *Server) httpsProgress(p httpboot.Progress) { s.webProgress("https", p) }

func (s *Server) webProgress(by string, p httpboot.Progress) {
	s.fetched(fetch{p.Client, by, p.Name, p.Offset + p.Sent, p.Size, p.Done, false, p.Err})
}

func (s *Server) fetched(f fetch) {
	mac, ok := s.who(f.client)
	if !ok {
		// Beyond a router nobody can be named.
		if f.done && s.mayTellOfStranger() {
			s.Event(pxe.Event{Time: s.cfg.Now(), Addr: f.client, Step: pxe.StateServed, Text: fmt.Sprintf("%s sent by %s", f.name, f.by)})
		}
		return
	}
	now := s.cfg.Now()
	m := s.machines
	m.mu.Lock()
	e := m.get(now, mac)
	m.at(e, f.client)
	learnt := e.ladder.Start
	e.ladder = e.ladder.Fetched()
	if e.ladder.Start != learnt {
		m.dirty = true
	}
	save := m.dirty
	if f.by == "https" {
		e.tlsOffered, e.plain = time.Time{}, false
	}
	e.Sent, e.Size = f.sent, f.size
	state := e.State
	if state != pxe.StateFetching && !f.done {
		e.begun = now
	}
	took := now.Sub(e.begun)
	m.mu.Unlock()
	if save {
		m.save()
	}
	switch {
	case f.probe:
	case f.err != nil:
		s.step(mac, f.client, pxe.StateSeen, false, fmt.Sprintf("%s by %s broke off after %s of %s: %s", f.name, f.by, megabytes(f.sent), megabytes(f.size), reason(f.err)))
	case f.done:
		if state != pxe.StateFetching {
			s.step(mac, f.client, pxe.StateFetching, false, fmt.Sprintf("fetching %s by %s", f.name, f.by))
		}
		s.step(mac, f.client, pxe.StateServed, false, fmt.Sprintf("%s (%s) sent by %s in %.1f s", f.name, megabytes(f.size), f.by, took.Seconds()))
	case state != pxe.StateFetching:
		s.step(mac, f.client, pxe.StateFetching, false, fmt.Sprintf("fetching %s (%s) by %s", f.name, megabytes(f.size), f.by))
	}
}

// reason keeps a client's own words out of events.
func reason(err error) string {
	m := err.Error()
	switch {
	case strings.Contains(m, "code="):
		return "the client gave up"
	case strings.Contains(m, "timeout"):
		return "the client stopped answering"
	}
	return "the connection ended"
}

func megabytes(n int64) string {
	if n < 100_000 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

// who finds the machine behind an address: our own leases first, then what
// the machine was seen with, then the kernel's ARP table, which knows every
// station that has just spoken to us.
func (s *Server) who(a netip.Addr) (pxe.MAC, bool) {
	if s.dhcp != nil {
		if mac, ok := s.dhcp.Holder(a); ok {
			return mac, true
		}
	}
	if mac, ok := neighbour(a); ok {
		return mac, true
	}
	s.machines.mu.Lock()
	defer s.machines.mu.Unlock()
	mac, ok := s.machines.byAddr[a]
	return mac, ok
}

// neighbour reads the kernel's ARP table.
func neighbour(a netip.Addr) (pxe.MAC, bool) {
	f, err := os.Open("/proc/thread-self/net/arp")
	if err != nil {
		return pxe.MAC{}, false
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		// IP address, HW type, Flags, HW address, Mask, Device
		col := strings.Fields(sc.Text())
		if len(col) >= 4 && col[0] == a.String() {
			mac, err := pxe.ParseMAC(col[3])
			return mac, err == nil && mac.Usable()
		}
	}
	return pxe.MAC{}, false
}
