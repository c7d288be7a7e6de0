package mdns

import (
	"bytes"
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/muster-edge/muster/discovery"
)

type dnsQuestion = dns.Question

var update = flag.Bool("update", false, "write the golden files anew")

var start = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func testZone(t testing.TB, label string) zone {
	t.Helper()
	z, err := newZone(label, 7445, siteTag, []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fe80::1")})
	if err != nil {
		t.Fatal(err)
	}
	return z
}

const labelA, labelB = "abcdefghijklmnop", "qrstuvwxyz234567"

func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := pack(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGoldenPackets(t *testing.T) {
	z := testZone(t, labelA)
	q, err := query([]known{
		{label: labelB, expires: start.Add(time.Hour)},
		{label: labelA, expires: start.Add(time.Minute)},
		{label: "disputedisputedi", expires: start.Add(time.Hour), disputed: true},
	}, start)
	if err != nil {
		t.Fatal(err)
	}
	enum := dns.Question{Name: services, Qtype: dns.TypePTR, Qclass: dns.ClassINET}
	var out strings.Builder
	for _, p := range []struct {
		name string
		b    []byte
	}{
		{"announcement", packed(t, response(oneAdvert, z))},
		{"goodbye", packed(t, withdrawal(z))},
		{"service enumeration", packed(t, response([]dns.Question{enum}, z))},
		{"query with one known answer of three", q},
	} {
		m, err := parse(p.b)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "== %s, %d bytes\n%s\n%s\n", p.name, len(p.b), m, hex.Dump(p.b))
	}
	const file = "testdata/packets.golden"
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || string(want) != out.String() {
		t.Errorf("%v; packets are now:\n%s", err, out.String())
	}
}

func TestAdvertsCarryTagAndPortOnly(t *testing.T) {
	b := packed(t, response(oneAdvert, testZone(t, labelA)))
	host, _ := os.Hostname()
	for _, secret := range []string{"default", "shop-1", host} {
		if secret != "" && bytes.Contains(bytes.ToLower(b), []byte(strings.ToLower(secret))) {
			t.Errorf("the advert contains %q", secret)
		}
	}
	if !bytes.Contains(b, []byte(siteTag)) {
		t.Error("the advert lacks the tag")
	}
}

func TestAdvertIn(t *testing.T) {
	change := func(f func(*dns.Msg)) *dns.Msg {
		m := response(oneAdvert, testZone(t, labelA))
		f(m)
		again, err := parse(packed(t, m))
		if err != nil {
			t.Fatal(err)
		}
		return again
	}
	drop := func(kind uint16) func(*dns.Msg) {
		return func(m *dns.Msg) {
			var left []dns.RR
			for _, rr := range m.Extra {
				if rr.Header().Rrtype != kind {
					left = append(left, rr)
				}
			}
			m.Extra = left
		}
	}
	for _, c := range []struct {
		when string
		m    *dns.Msg
		ok   bool
	}{
		{"a whole advert", change(func(*dns.Msg) {}), true},
		{"upper case", change(func(m *dns.Msg) { m.Answer[0].Header().Name = "_MUSTER._TCP.LOCAL." }), true},
		{"no port", change(drop(dns.TypeSRV)), false},
		{"no tag", change(drop(dns.TypeTXT)), false},
		{"no pointer", change(func(m *dns.Msg) { m.Answer = nil }), false},
		{"another service", change(func(m *dns.Msg) { m.Answer[0].Header().Name = "_other._tcp.local." }), false},
		{"a label not of ours", change(func(m *dns.Msg) { m.Answer[0].(*dns.PTR).Ptr = "printer._muster._tcp.local." }), false},
		{"another class", change(func(m *dns.Msg) { m.Answer[0].Header().Class = dns.ClassCHAOS }), false},
	} {
		a, ok := advertIn(c.m)
		if ok != c.ok {
			t.Errorf("when %s: %+v, %v", c.when, a, ok)
		}
		if ok && (a.label != labelA || a.port != 7445 || a.tag != siteTag || a.ttl != discovery.AdvertTTL) {
			t.Errorf("when %s: %+v", c.when, a)
		}
	}
	m, err := parse(packed(t, withdrawal(testZone(t, labelA))))
	if err != nil {
		t.Fatal(err)
	}
	if a, ok := advertIn(m); !ok || a.ttl != 0 {
		t.Errorf("goodbye: %+v, %v", a, ok)
	}
}

func TestParseRefuses(t *testing.T) {
	good := packed(t, response(oneAdvert, testZone(t, labelA)))
	if _, err := parse(good); err != nil {
		t.Fatal(err)
	}
	with := func(at int, v ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], v)
		return b
	}
	for when, b := range map[string][]byte{
		"empty":            nil,
		"a header cut off": good[:11],
		"a record cut off": good[:len(good)-3],
		"too long":         append(bytes.Clone(good), make([]byte, maxPacket)...),
		"many questions":   with(4, 0, maxQuestions+1),
		"many answers":     with(6, 0xff, 0xff),
		"another opcode":   with(2, 0x28|0x84),
		"a response code":  with(3, 3),
	} {
		if _, err := parse(b); err == nil {
			t.Errorf("when %s: parsed", when)
		}
	}
}

func TestConcerns(t *testing.T) {
	q, _ := query(nil, start)
	other := &dns.Msg{Question: []dns.Question{{Name: "_ipp._tcp.local.", Qtype: dns.TypePTR, Qclass: 1}}}
	o, _ := other.Pack()
	other.Question[0].Name = labelA + ".local."
	own, _ := other.Pack()
	if !concerns(q, labelA) || !concerns(bytes.ToUpper(q), labelA) || !concerns(own, labelA) {
		t.Error("a question about us is taken for noise")
	}
	if concerns(o, labelA) || concerns(own, labelB) || concerns(nil, labelA) || concerns([]byte("0123456789ab\x07_mus"), labelA) {
		t.Error("noise is taken for a question about us")
	}
}

// fake is a service with one link whose packets are kept.
type fake struct {
	*Service
	l    *link
	sent []*dns.Msg
	to   []netip.AddrPort
}

func newFake(t *testing.T) *fake {
	s, err := New(Config{Tag: siteTag, Source: rand.NewPCG(1, 1)})
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{Service: s}
	f.l = &link{linkKey: linkKey{1, "eth0", false}, unicasts: unicastBurst}
	f.l.write = func(b []byte, to netip.AddrPort) error {
		m, err := parse(b)
		if err != nil {
			t.Fatal(err)
		}
		f.sent, f.to = append(f.sent, m), append(f.to, to)
		return nil
	}
	s.readdress(start, f.l, []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")})
	f.l.announce = discovery.Schedule{}
	s.links[f.l.linkKey] = f.l
	return f
}

var asker = netip.MustParseAddrPort("10.0.0.9:5353")

func (f *fake) ask(t *testing.T, now time.Time, from netip.AddrPort, change func(*dns.Msg)) {
	m := &dns.Msg{Question: []dns.Question{ourAdvert}}
	if change != nil {
		change(m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	f.handle(now, packet{link: f.l, from: from, data: b})
}

// until steps the service on virtual time.
func (f *fake) until(now, end time.Time) {
	for now.Before(end) {
		f.step(now)
		now = now.Add(5 * time.Millisecond)
	}
}

func knownUs(label string, ttl uint32) func(*dns.Msg) {
	return func(m *dns.Msg) {
		m.Answer = append(m.Answer, &dns.PTR{Hdr: dns.RR_Header{Name: service, Rrtype: dns.TypePTR, Class: 1, Ttl: ttl}, Ptr: label + "." + service})
	}
}

func TestAnswers(t *testing.T) {
	both := func(fs ...func(*dns.Msg)) func(*dns.Msg) {
		return func(m *dns.Msg) {
			for _, f := range fs {
				f(m)
			}
		}
	}
	tc := func(m *dns.Msg) { m.Truncated = true }
	qu := func(m *dns.Msg) { m.Question[0].Qclass |= topBit }
	for _, c := range []struct {
		when    string
		do      func(f *fake)
		replies int
		to      netip.AddrPort
	}{
		{"asked", func(f *fake) { f.ask(t, start, asker, nil) }, 1, group4},
		{"asked in upper case", func(f *fake) {
			f.ask(t, start, asker, func(m *dns.Msg) { m.Question[0].Name = strings.ToUpper(service) })
		}, 1, group4},
		{"asked by ten at once", func(f *fake) {
			for i := range 10 {
				f.ask(t, start, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(20 + i)}), port), nil)
			}
		}, 1, group4},
		{"the asker knows us (§7.1)", func(f *fake) { f.ask(t, start, asker, knownUs(f.label, 4000)) }, 0, group4},
		{"the asker knows us, but not for long (§7.1)", func(f *fake) { f.ask(t, start, asker, knownUs(f.label, 1000)) }, 1, group4},
		{"the asker knows another", func(f *fake) { f.ask(t, start, asker, knownUs(labelB, 4000)) }, 1, group4},
		{"more known answers follow, and name us (§7.2)", func(f *fake) {
			f.ask(t, start, asker, tc)
			f.ask(t, start.Add(50*time.Millisecond), asker, both(func(m *dns.Msg) { m.Question = nil }, knownUs(f.label, 4000)))
		}, 0, group4},
		{"another's known answers do not silence us", func(f *fake) {
			f.ask(t, start, asker, tc)
			f.ask(t, start.Add(50*time.Millisecond), netip.MustParseAddrPort("10.0.0.66:5353"), both(func(m *dns.Msg) { m.Question = nil }, knownUs(f.label, 4000)))
		}, 1, group4},
		{"asked for another service", func(f *fake) {
			f.ask(t, start, asker, func(m *dns.Msg) { m.Question[0].Name = "_other._tcp.local." })
		}, 0, group4},
		{"asked for another class", func(f *fake) {
			f.ask(t, start, asker, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
		}, 0, group4},
		{"asked for unicast, not heard lately (§5.4)", func(f *fake) { f.ask(t, start, asker, qu) }, 1, group4},
		{"asked for unicast, heard lately (§5.4)", func(f *fake) {
			f.l.multicast = start.Add(-10 * time.Second)
			f.ask(t, start, asker, qu)
		}, 1, asker},
		{"asked by a plain resolver (§6.7)", func(f *fake) {
			f.ask(t, start, netip.MustParseAddrPort("10.0.0.9:40000"), func(m *dns.Msg) { m.Id = 7 })
		}, 1, netip.MustParseAddrPort("10.0.0.9:40000")},
		{"our own query comes back", func(f *fake) {
			b, _ := query(nil, start)
			f.l.lastQuery = b
			f.handle(start, packet{link: f.l, from: netip.MustParseAddrPort("10.0.0.1:5353"), data: b})
		}, 0, group4},
		{"the same query of another", func(f *fake) {
			b, _ := query(nil, start)
			f.l.lastQuery = b
			f.handle(start, packet{link: f.l, from: asker, data: b})
		}, 1, group4},
	} {
		f := newFake(t)
		c.do(f)
		f.until(start, start.Add(900*time.Millisecond))
		if len(f.sent) != c.replies {
			t.Errorf("when %s: %d replies, want %d", c.when, len(f.sent), c.replies)
			continue
		}
		if c.replies == 1 && f.to[0] != c.to {
			t.Errorf("when %s: to %s, want %s", c.when, f.to[0], c.to)
		}
		if c.replies == 1 && c.to.Port() == 40000 {
			if m := f.sent[0]; m.Id != 7 || len(m.Question) != 1 || m.Answer[0].Header().Ttl > 10 {
				t.Errorf("when %s: %s", c.when, m)
			}
		}
	}
}

func TestOnceASecond(t *testing.T) {
	f := newFake(t)
	for now := start; now.Before(start.Add(10 * time.Second)); now = now.Add(10 * time.Millisecond) {
		f.ask(t, now, asker, nil)
		f.until(now, now.Add(10*time.Millisecond))
	}
	if n := len(f.sent); n < 9 || n > 11 {
		t.Errorf("%d multicast answers in 10 s of questions, want one a second (§6)", n)
	}
	f = newFake(t)
	for now := start; now.Before(start.Add(time.Second)); now = now.Add(time.Millisecond) {
		f.ask(t, now, netip.MustParseAddrPort("10.0.0.9:40000"), nil)
	}
	if n := len(f.sent); n < unicastBurst || n > unicastBurst+unicastRate {
		t.Errorf("%d unicast answers in a second, want %d to %d", n, unicastBurst, unicastBurst+unicastRate)
	}
}

func TestADisputedAdvertIsNotListedAsKnown(t *testing.T) {
	f := newFake(t)
	hear := func(from string) {
		f.handle(start, packet{link: f.l, from: netip.MustParseAddrPort(from), data: packed(t, response(oneAdvert, testZone(t, labelB)))})
	}
	listed := func() int {
		b, err := query(f.l.known, start)
		if err != nil {
			t.Fatal(err)
		}
		m, err := parse(b)
		if err != nil {
			t.Fatal(err)
		}
		return len(m.Answer)
	}
	hear("10.0.0.2:5353")
	if listed() != 1 {
		t.Fatal("an advert we heard is not listed")
	}
	hear("10.0.0.3:5353")
	if listed() != 0 {
		t.Error("a second claimant can silence the first")
	}
	hints, err := f.Wait(t.Context())
	if err != nil || len(hints) != 2 {
		t.Errorf("hints %v, %v: want both claimants", hints, err)
	}
}

func TestWhatGivesNoHint(t *testing.T) {
	good := packed(t, response(oneAdvert, testZone(t, labelB)))
	for _, c := range []struct {
		when string
		from string
		b    func(*fake) []byte
		want int
	}{
		{"an advert", "10.0.0.2:5353", func(*fake) []byte { return good }, 1},
		{"not from port 5353 (§6)", "10.0.0.2:5354", func(*fake) []byte { return good }, 0},
		{"our own", "10.0.0.1:5353", func(f *fake) []byte { return packed(t, response(oneAdvert, f.l.zone)) }, 0},
		{"another site's", "10.0.0.2:5353", func(*fake) []byte {
			z, _ := newZone(labelB, 7445, discovery.Tag("default", "shop-2"), []netip.Addr{netip.MustParseAddr("10.0.0.2")})
			return packed(t, response(oneAdvert, z))
		}, 0},
		{"rubbish", "10.0.0.2:5353", func(*fake) []byte { return good[:30] }, 0},
	} {
		f := newFake(t)
		f.handle(start, packet{link: f.l, from: netip.MustParseAddrPort(c.from), data: c.b(f)})
		if n := int(f.Counters().Hints); n != c.want {
			t.Errorf("when %s: %d hints, want %d", c.when, n, c.want)
		}
	}
}

func TestQueue(t *testing.T) {
	q := newQueue(3)
	h := func(i int, bye bool) discovery.Hint {
		return discovery.Hint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1), Goodbye: bye}
	}
	q.put(h(1, false))
	q.put(h(2, false))
	q.put(h(1, true))
	got, err := q.wait(t.Context())
	if err != nil || len(got) != 2 || !got[0].Goodbye {
		t.Fatalf("%v, %v: want the last of each address", got, err)
	}
	for i := range 1000 {
		q.put(h(i, false))
	}
	got, _ = q.wait(t.Context())
	if len(got) != 3 || len(q.at) != 0 || q.dropped.Load() != 997 {
		t.Errorf("%d kept, %d dropped", len(got), q.dropped.Load())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := q.wait(ctx); err == nil {
		t.Error("waits for ever")
	}
}

func TestConfigProblems(t *testing.T) {
	_, err := New(Config{Tag: "x", Queue: -1, Rescan: time.Nanosecond})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"site tag", "Queue", "Rescan"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
	if !Usable("eth0") || Usable("cni0") || Usable("veth12") {
		t.Error("the default choice of interfaces")
	}
}

func FuzzMessage(f *testing.F) {
	z := testZone(f, labelA)
	for _, m := range []*dns.Msg{response(oneAdvert, z), withdrawal(z), {Question: []dns.Question{ourAdvert}}} {
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		concerns(b, labelA)
		m, err := parse(b)
		if err != nil {
			return
		}
		knows(m, labelA)
		if a, ok := advertIn(m); ok && (a.port == 0 || a.tag.Validate() != nil || a.ttl > discovery.AdvertTTL || len(a.label) != 16) {
			t.Fatalf("%+v", a)
		}
		for _, q := range m.Question {
			if r := response([]dns.Question{q}, z); r != nil {
				legacy(r, m)
				if _, err := r.Pack(); err != nil {
					t.Fatalf("cannot answer %+v: %v", q, err)
				}
			}
		}
	})
}

func BenchmarkForgedAdvert(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 1))
	p := forgedAdvert(rng, netip.MustParseAddr("10.0.0.2"))
	b.ReportAllocs()
	for b.Loop() {
		m, err := parse(p)
		if err != nil {
			b.Fatal(err)
		}
		advertIn(m)
	}
}

func BenchmarkNoise(b *testing.B) {
	p := bytes.Repeat([]byte("_googlecast"), 120)
	b.ReportAllocs()
	for b.Loop() {
		concerns(p, labelA)
	}
}

func TestQueriesFitAFrame(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var all []known
	for range maxKnown {
		all = append(all, known{label: discovery.NewLabel(rng), expires: start.Add(time.Hour)})
	}
	b, err := query(all, start)
	if err != nil || len(b) > maxSend || len(b) < maxSend/2 {
		t.Errorf("a query with %d known answers has %d bytes, %v", len(all), len(b), err)
	}
	var ips []netip.Addr
	for i := range 200 {
		ips = append(ips, netip.AddrFrom16([16]byte{0xfd, 15: byte(i)}))
	}
	z, err := newZone(labelA, 7445, siteTag, ips)
	if err != nil {
		t.Fatal(err)
	}
	if b := packed(t, response(oneAdvert, z)); len(b) > maxSend {
		t.Errorf("an announcement of %d bytes", len(b))
	}
}
