package mdns

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/muster-edge/muster/discovery"
)

// settle is how long after a change of links one looks at them: changes come
// in bursts.
const settle = 50 * time.Millisecond

// Run advertises and listens until ctx ends, then says goodbye. It may be
// called once. All sockets are opened on the calling goroutine.
func (s *Service) Run(ctx context.Context) error {
	if s.running.Swap(true) {
		return errors.New("mdns: run: may be called once")
	}
	changed, stop, err := watch()
	if err != nil {
		s.log.Warn("the kernel does not tell of link changes, looking now and then", "err", err)
		stop = func() {}
	}
	defer stop()
	defer func() {
		for _, l := range s.links {
			s.leave(l)
		}
	}()
	now := time.Now()
	s.rescan(now)
	look := now.Add(s.cfg.Rescan)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			s.goodbye()
			return nil
		case p := <-s.in:
			now = time.Now()
			s.handle(now, p)
		case <-changed:
			now = time.Now()
			if at := now.Add(settle); at.Before(look) {
				look = at
			}
		case <-timer.C:
			now = time.Now()
		}
		if !now.Before(look) {
			s.rescan(now)
			look = now.Add(s.cfg.Rescan)
		}
		next := s.step(now)
		if look.Before(next) {
			next = look
		}
		timer.Reset(next.Sub(now))
	}
}

// step sends what is due and returns when to come back.
func (s *Service) step(now time.Time) time.Time {
	next := now.Add(time.Hour)
	soon := func(at time.Time, ok bool) {
		if ok && at.Before(next) {
			next = at
		}
	}
	for _, l := range s.links {
		if l.queries.Due(now) {
			b, err := query(l.known, now)
			if err == nil && s.send(l, b, l.group()) {
				l.lastQuery = b
				s.c.queries.Add(1)
				l.queries.Sent(now)
			} else {
				l.queries.Failed(now)
			}
		}
		if l.announce.Due(now) && now.Sub(l.multicast) >= time.Second {
			if s.multicast(now, l, []dns.Question{ourAdvert}) {
				s.c.announcements.Add(1)
				l.announce.Sent(now)
			} else {
				l.announce.Failed(now)
			}
		} else if l.announce.Due(now) {
			soon(l.multicast.Add(time.Second), true)
		}
		if !l.reply.at.IsZero() && !now.Before(l.reply.at) {
			if now.Sub(l.multicast) < time.Second {
				l.reply.at = l.multicast.Add(time.Second) // an announcement came between
			} else {
				if s.multicast(now, l, l.reply.questions) {
					s.c.replies.Add(1)
				}
				l.reply = reply{}
			}
		}
		soon(l.queries.At())
		if at, ok := l.announce.At(); ok && at.After(now) {
			soon(at, true)
		}
		soon(l.reply.at, !l.reply.at.IsZero())
	}
	return next
}

func (s *Service) send(l *link, b []byte, to netip.AddrPort) bool {
	if err := l.write(b, to); err != nil {
		s.c.sendErrors.Add(1)
		s.log.Debug("cannot send", "interface", l.name, "ipv6", l.v6, "err", err)
		return false
	}
	return true
}

func (s *Service) multicast(now time.Time, l *link, questions []dns.Question) bool {
	m := response(questions, l.zone)
	if m == nil {
		return false
	}
	b, err := pack(m)
	if err != nil || !s.send(l, b, l.group()) {
		return false
	}
	l.multicast = now
	return true
}

// goodbye withdraws the advert (RFC 6762 §10.1), once per link: a host that
// misses it learns the same by dialling.
func (s *Service) goodbye() {
	for _, l := range s.links {
		b, err := pack(withdrawal(l.zone))
		if err == nil && s.send(l, b, l.group()) {
			s.c.goodbyes.Add(1)
		}
	}
}

func (s *Service) handle(now time.Time, p packet) {
	if s.links[p.link.linkKey] != p.link {
		return // the link has gone since
	}
	m, err := parse(p.data)
	if err != nil {
		s.c.malformed.Add(1)
		return
	}
	if m.Response {
		s.hear(now, p, m)
		return
	}
	if bytes.Equal(p.data, p.link.lastQuery) && p.link.own(p.from.Addr()) {
		return // our own, looped back
	}
	s.answer(now, p, m)
}

// hear turns an advert into a hint.
func (s *Service) hear(now time.Time, p packet, m *dns.Msg) {
	if p.from.Port() != port { // §6: only from 5353
		s.c.malformed.Add(1)
		return
	}
	a, ok := advertIn(m)
	if !ok || a.label == s.label {
		return
	}
	if a.tag != s.cfg.Tag {
		s.c.otherSite.Add(1)
		return
	}
	ip := p.from.Addr()
	p.link.learn(now, a, ip)
	if ip.Is6() && ip.IsLinkLocalUnicast() {
		ip = ip.WithZone(p.link.name)
	}
	s.c.hints.Add(1)
	s.hints.put(discovery.Hint{
		Source: discovery.SourceMulticast, Addr: netip.AddrPortFrom(ip, a.port),
		Tag: a.tag, Instance: a.label, TTL: a.ttl, Goodbye: a.ttl == 0,
	})
}

// answer plans or sends the answer to a query.
func (s *Service) answer(now time.Time, p packet, m *dns.Msg) {
	l := p.link
	knowsUs := knows(m, s.label)
	if r := &l.reply; knowsUs && !r.at.IsZero() && !r.several && r.asker == p.from.Addr() {
		*r = reply{} // §7.2: the rest of its known answers names us
		s.c.suppressed.Add(1)
	}
	var multi, uni []dns.Question
	for _, q := range m.Question {
		q.Name = strings.ToLower(q.Name)
		if len(l.zone.records(q)) == 0 {
			continue
		}
		if knowsUs && q.Name == service {
			s.c.suppressed.Add(1)
			continue
		}
		unicast := q.Qclass&topBit != 0
		q.Qclass &^= topBit
		if p.from.Port() != port || unicast && now.Sub(l.multicast) < discovery.HostTTL/4 {
			uni = append(uni, q)
		} else {
			multi = append(multi, q)
		}
	}
	if len(uni) > 0 {
		s.unicast(now, p, m, uni)
	}
	if len(multi) == 0 {
		return
	}
	at := discovery.ReplyAt(now, l.multicast, m.Truncated, s.rng)
	r := &l.reply
	switch {
	case r.at.IsZero():
		*r = reply{at: at, asker: p.from.Addr()}
	case at.Before(r.at):
		r.at = at
	}
	r.several = r.several || r.asker != p.from.Addr()
	for _, q := range multi {
		if len(r.questions) < maxQuestions && !slices.Contains(r.questions, q) {
			r.questions = append(r.questions, q)
		}
	}
}

// unicast answers a single asker: one that wants it so and heard us lately
// (§5.4), or a plain resolver (§6.7). Sources can be forged, so these are few.
func (s *Service) unicast(now time.Time, p packet, m *dns.Msg, questions []dns.Question) {
	if !p.link.mayUnicast(now) {
		s.c.suppressed.Add(1)
		return
	}
	r := response(questions, p.link.zone)
	if r == nil {
		return
	}
	if p.from.Port() != port {
		legacy(r, m)
	}
	if b, err := pack(r); err == nil && s.send(p.link, b, p.from) {
		s.c.replies.Add(1)
	}
}
