package discovery

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// drawAddr draws few hosts, so that addresses meet again, and some nonsense.
func drawAddr(t *rapid.T) netip.AddrPort {
	port := uint16(rapid.SampledFrom([]int{7445, 7445, 1, 2, 65535, 0}).Draw(t, "port"))
	switch rapid.IntRange(0, 3).Draw(t, "form") {
	case 0:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(1, 40).Draw(t, "host"))}), port)
	case 1:
		ip := netip.AddrFrom16([16]byte{0xfe, 0x80, 15: byte(rapid.IntRange(1, 40).Draw(t, "host"))})
		return netip.AddrPortFrom(ip.WithZone(rapid.SampledFrom([]string{"eth0", "eth1", ""}).Draw(t, "zone")), port)
	case 2:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "ip"))), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "ip"))), port)
}

func drawHint(t *rapid.T) Hint {
	h := Hint{
		Source:   Source(rapid.IntRange(0, numSources).Draw(t, "source")),
		Addr:     drawAddr(t),
		Tag:      siteTag,
		Instance: rapid.SampledFrom([]string{"abcdefghijklmnop", "qrstuvwxyz234567", ""}).Draw(t, "instance"),
		TTL:      time.Duration(rapid.Int64Range(-1, int64(100*time.Hour)).Draw(t, "ttl")),
		Goodbye:  rapid.IntRange(0, 5).Draw(t, "goodbye") == 0,
	}
	if rapid.Bool().Draw(t, "via") {
		h.Via = nodeN(rapid.IntRange(1, 8).Draw(t, "teller"))
	}
	if rapid.IntRange(0, 9).Draw(t, "foreign") == 0 {
		h.Tag = "aaaaaaaaaaaaaaaa"
	}
	return h
}

// smallConfig makes bounds that random input reaches.
func smallConfig() Config {
	return Config{
		Tag: siteTag, MaxHeard: 6, MaxTold: 8, MaxToldBy: 3, MaxConfigured: 4, MaxPeers: 5, MaxAddrs: 3,
		Known: Rate{4, 5}, Told: Rate{2, 3}, Heard: Rate{2, 3}, ForgetAfter: 48 * time.Hour,
	}
}

// sound checks the table's own books.
func sound(t *rapid.T, tab *Table) {
	cfg := tab.cfg
	held := [numSources]int{}
	heard := [2]map[netip.Addr]int{{}, {}}
	for i, e := range tab.entries {
		if e.slot != i || tab.byAddr[e.addr] != e {
			t.Fatalf("%s is filed wrongly", e.addr)
		}
		loose := e.node == ""
		for s := range e.until {
			if !e.until[s].IsZero() {
				held[s]++
				loose = false
			}
		}
		if loose {
			t.Fatalf("%s is held by nothing", e.addr)
		}
		if !e.until[SourceMulticast].IsZero() {
			heard[family(e.addr.Addr())][e.addr.Addr()]++
		}
		if e.node != "" && !e.proven.IsZero() && !e.until[SourceMulticast].IsZero() {
			t.Fatalf("%s is proven and takes an advertised host's place", e.addr)
		}
		if (e.state >= Proven) != (e.node != "") {
			t.Fatalf("%s is %s with node %q", e.addr, e.state, e.node)
		}
		if n := tab.nodes[e.node]; e.node != "" && (n == nil || !contains(n.addrs, e)) {
			t.Fatalf("%s is not with its node", e.addr)
		}
	}
	if held != tab.held || len(tab.byAddr) != len(tab.entries) {
		t.Fatalf("held %v, counted %v", tab.held, held)
	}
	for f := range heard {
		if len(heard[f]) != tab.heardHosts[f] || len(heard[f]) > cfg.MaxHeard {
			t.Fatalf("family %d: %d hosts, counted %d, most %d", f, tab.heardHosts[f], len(heard[f]), cfg.MaxHeard)
		}
		for ip, n := range heard[f] {
			if n > maxPorts {
				t.Fatalf("%s has %d ports", ip, n)
			}
		}
	}
	if len(tab.heardPorts) != len(heard[0])+len(heard[1]) {
		t.Fatalf("%d hosts with ports, want %d", len(tab.heardPorts), len(heard[0])+len(heard[1]))
	}
	told := 0
	for id, n := range tab.toldBy {
		told += n
		if n > cfg.MaxToldBy || n < 1 {
			t.Fatalf("%s told %d", id, n)
		}
	}
	if told != held[SourcePeer] || told > cfg.MaxTold || held[SourceConfigured] > cfg.MaxConfigured || held[SourceRemembered] > cfg.MaxPeers*cfg.MaxAddrs {
		t.Fatalf("pools: %v, told %d", held, told)
	}
	if len(tab.nodes) > cfg.MaxPeers {
		t.Fatalf("%d nodes", len(tab.nodes))
	}
	for id, n := range tab.nodes {
		if len(n.addrs) == 0 || len(n.addrs) > cfg.MaxAddrs {
			t.Fatalf("%s has %d addresses", id, len(n.addrs))
		}
	}
	if most := 2*maxPorts*cfg.MaxHeard + cfg.MaxTold + cfg.MaxConfigured + 2*cfg.MaxPeers*cfg.MaxAddrs; len(tab.entries) > most {
		t.Fatalf("%d addresses, most %d", len(tab.entries), most)
	}
}

func contains(list []*entry, e *entry) bool {
	for _, x := range list {
		if x == e {
			return true
		}
	}
	return false
}

// TestAnyInput drives a table with anything: its books hold, its memory is
// bounded, and its dials keep to every rate.
func TestAnyInput(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab, err := New(smallConfig(), rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		if err != nil {
			t.Fatal(err)
		}
		now := start
		lastDial := map[netip.AddrPort]time.Time{}
		var dialled [numClasses][]time.Time
		rates := [numClasses]Rate{tab.cfg.Known, tab.cfg.Told, tab.cfg.Heard}
		steps := rapid.IntRange(1, 150).Draw(t, "steps")
		for range steps {
			if rapid.IntRange(0, 4).Draw(t, "jump") == 0 {
				now = now.Add(time.Duration(rapid.Int64Range(-int64(time.Hour), int64(50*time.Hour)).Draw(t, "by")))
			} else {
				now = now.Add(time.Duration(rapid.Int64Range(0, int64(3*time.Second)).Draw(t, "by")))
			}
			switch rapid.IntRange(0, 9).Draw(t, "act") {
			case 0, 1, 2, 3:
				tab.Observe(now, drawHint(t))
			case 4, 5:
				for _, d := range tab.Dials(now) {
					at := tab.now
					if l, ok := lastDial[d.Addr]; ok && at.Sub(l) < tab.cfg.BackOffMin*3/4 && at.After(l) {
						t.Fatalf("%s dialled twice within %s", d.Addr, at.Sub(l))
					}
					lastDial[d.Addr] = at
					c := tab.classOf(tab.byAddr[d.Addr])
					dialled[c] = append(dialled[c], at)
				}
			case 6:
				tab.Proven(now, drawAddr(t), nodeN(rapid.IntRange(1, 8).Draw(t, "node")))
			case 7:
				tab.Failed(now, drawAddr(t), Failure(rapid.IntRange(0, 2).Draw(t, "failure")))
			case 8:
				tab.Expire(now)
				tab.Restore(now, tab.Memory())
			case 9:
				tab.Forget(now, nodeN(rapid.IntRange(1, 8).Draw(t, "node")))
			}
			sound(t, tab)
			if wake, ok := tab.Wake(now); ok && len(tab.entries) == 0 {
				t.Fatalf("wakes at %s for nothing", wake)
			}
		}
		for c, times := range dialled {
			for i := range times {
				for j := i; j < len(times); j++ {
					most := float64(rates[c].Burst) + times[j].Sub(times[i]).Seconds()*rates[c].PerSecond
					if float64(j-i+1) > most+0.001 {
						t.Fatalf("class %d: %d dials in %s", c, j-i+1, times[j].Sub(times[i]))
					}
				}
			}
		}
	})
}

// TestAdvertsNeverForgetAPeer: after a proof, no series of adverts, goodbyes
// and failed dials within ForgetAfter takes the peer or its address away, nor
// what it told, nor what was configured.
func TestAdvertsNeverForgetAPeer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab, err := New(smallConfig(), rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		if err != nil {
			t.Fatal(err)
		}
		now := start
		tab.Proven(now, at("10.0.0.7:7445"), nodeN(1))
		tab.Observe(now, Hint{Source: SourcePeer, Via: nodeN(1), Addr: at("10.0.0.8:7445")})
		tab.Observe(now, Hint{Source: SourceConfigured, Addr: at("10.0.0.9:7445")})
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(5*time.Minute)).Draw(t, "by")))
			h := drawHint(t)
			h.Source = SourceMulticast
			tab.Observe(now, h)
			if rapid.Bool().Draw(t, "dial") {
				for _, d := range tab.Dials(now) {
					tab.Failed(now, d.Addr, Failure(rapid.IntRange(0, 2).Draw(t, "failure")))
				}
			}
			tab.Expire(now)
		}
		if p := tab.Peers(); len(p) != 1 || p[0].Node != nodeN(1) || p[0].Addrs[0] != at("10.0.0.7:7445") {
			t.Fatalf("peers: %+v", p)
		}
		for _, a := range []string{"10.0.0.8:7445", "10.0.0.9:7445"} {
			if tab.byAddr[at(a)] == nil {
				t.Fatalf("%s is gone", a)
			}
		}
		if wake, ok := tab.Wake(now); !ok || wake.Sub(now) > tab.cfg.BackOffHint*2 {
			t.Fatalf("wakes at %s (%v): peers would not be looked for", wake, ok)
		}
	})
}

// TestEveryHintIsDialled: what the table accepted and did not evict is dialled
// within the time that its kind's rate allows. Nothing starves.
func TestEveryHintIsDialled(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tab, err := New(Config{Tag: siteTag}, rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		if err != nil {
			t.Fatal(err)
		}
		hosts := rapid.IntRange(1, 254).Draw(t, "hosts")
		for i := range hosts {
			tab.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i+1)))
		}
		seen := map[netip.AddrPort]bool{}
		now := start
		for now.Sub(start) < 2*time.Minute && len(seen) < hosts {
			wake, ok := tab.Wake(now)
			if !ok {
				t.Fatal("no wake")
			}
			now = wake
			ds := tab.Dials(now)
			if len(ds) == 0 {
				t.Fatalf("woken at %s for nothing", now.Sub(start))
			}
			for _, d := range ds {
				seen[d.Addr] = true
			}
		}
		if len(seen) < hosts {
			t.Fatalf("%d of %d dialled in 2 minutes", len(seen), hosts)
		}
	})
}

// TestSameSeedSameAnswers: a failing simulation must replay.
func TestSameSeedSameAnswers(t *testing.T) {
	run := func() []any {
		tab := newTable(t, func(c *Config) { *c = smallConfig() })
		rng := rand.New(rand.NewPCG(7, 7))
		var log []any
		now := start
		for i := range 3000 {
			now = now.Add(time.Duration(rng.IntN(int(time.Second))))
			h := advert(fmt.Sprintf("10.0.%d.%d:%d", rng.IntN(2), rng.IntN(200)+1, 7440+rng.IntN(6)))
			h.Source, h.Via = Source(rng.IntN(3)), nodeN(rng.IntN(5))
			h.TTL = time.Duration(rng.IntN(int(time.Minute)))
			log = append(log, tab.Observe(now, h))
			for _, d := range tab.Dials(now) {
				log = append(log, d)
				if rng.IntN(3) == 0 {
					tab.Proven(now, d.Addr, nodeN(rng.IntN(9)))
				} else {
					tab.Failed(now, d.Addr, Failure(rng.IntN(3)))
				}
			}
			if i%50 == 0 {
				tab.Expire(now)
				log = append(log, tab.Memory(), tab.Peers(), tab.Share("", 4))
			}
		}
		return log
	}
	a, b := run(), run()
	if !reflect.DeepEqual(a, b) {
		t.Fatal("two runs with one seed differ")
	}
}

func TestSchedulesKeepTheRFC(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		q := Queries(start, rng)
		first, _ := q.At()
		if d := first.Sub(start); d < 20*time.Millisecond || d > 120*time.Millisecond {
			t.Fatalf("first query after %s (§5.2)", d)
		}
		now, gap := first, time.Duration(0)
		for i := range 30 {
			q.Sent(now)
			next, ok := q.At()
			if !ok {
				t.Fatal("queries end")
			}
			g := next.Sub(now)
			if i == 0 && g < time.Second || i > 0 && g < 2*gap && g < time.Hour || g >= AdvertTTL {
				t.Fatalf("gap %d is %s after %s (§5.2)", i, g, gap)
			}
			now, gap = next, g
		}
		a := Announcements(start, rng)
		now, gap = start, 0
		n := 0
		for {
			at, ok := a.At()
			if !ok {
				break
			}
			g := at.Sub(now)
			if n == 1 && g < time.Second || n > 1 && g < 2*gap {
				t.Fatalf("announcement %d after %s (§8.3)", n, g)
			}
			now, gap = at, g
			a.Sent(now)
			n++
		}
		if n < 2 || n > 8 {
			t.Fatalf("%d announcements (§8.3)", n)
		}
		last := start.Add(-time.Duration(rapid.IntRange(0, 3000).Draw(t, "ms")) * time.Millisecond)
		tc := rapid.Bool().Draw(t, "tc")
		at := ReplyAt(start, last, tc, rng)
		if at.Sub(last) < time.Second || at.Sub(start) < 20*time.Millisecond || tc && at.Sub(start) < 400*time.Millisecond {
			t.Fatalf("reply after %s, %s after the last (§6, §7.2)", at.Sub(start), at.Sub(last))
		}
	})
}

func TestZeroScheduleIsOver(t *testing.T) {
	var s Schedule
	if s.Due(start) {
		t.Error("due")
	}
	s.Sent(start)
	if _, ok := s.At(); ok {
		t.Error("goes on")
	}
}

func FuzzParseTXT(f *testing.F) {
	for _, s := range []string{"site=abcdefghijklmnop", "SITE=abcdefghijklmnop\x00x=1", "site=", "site", "=", "x=1\x00site=abcdefghijklmno1", "site=ABCDEFGHIJKLMNOP"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var strs []string
		for len(s) > 0 {
			i := min(len(s), 1+int(s[0])%40)
			strs = append(strs, s[:i])
			s = s[i:]
		}
		tag, err := ParseTXT(strs)
		if (err == nil) != (tag.Validate() == nil) {
			t.Fatalf("%q, %v", tag, err)
		}
		if err == nil {
			if again, err := ParseTXT(tag.TXT()); err != nil || again != tag {
				t.Fatalf("%q became %q, %v", tag, again, err)
			}
		}
	})
}

func FuzzParseInstance(f *testing.F) {
	for _, s := range []string{"abcdefghijklmnop._muster._tcp.local.", "ABCDEFGHIJKLMNOP._Muster._TCP.Local", "_muster._tcp.local.", "a\\.b._muster._tcp.local.", ".", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		label, err := ParseInstance(s)
		if (err == nil) != isName(label) {
			t.Fatalf("%q: %q, %v", s, label, err)
		}
		if err == nil {
			if again, err := ParseInstance(label + "." + Service + "." + Domain + "."); err != nil || again != label {
				t.Fatalf("%q became %q, %v", label, again, err)
			}
		}
	})
}

func FuzzParseMemory(f *testing.F) {
	f.Add([]byte(`{"format":"muster/peers/v1","peers":[{"node":"` + string(nodeN(1)) + `","addrs":["10.0.0.1:7445","[fe80::1%eth0]:7445"]}]}`))
	f.Add([]byte(`{"format":"muster/peers/v1","peers":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMemory(b)
		if err != nil {
			return
		}
		tab := newTable(t, nil)
		tab.Restore(start, m)
		out, err := json.Marshal(tab.Memory())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseMemory(out); err != nil {
			t.Fatalf("our own memory is refused: %v\n%s", err, out)
		}
	})
}

func TestTagSaysNothing(t *testing.T) {
	if Tag("default", "shop-1") == Tag("default", "shop-2") || Tag("a", "bc") == Tag("ab", "c") {
		t.Error("two sites, one tag")
	}
	if got := Tag("default", "shop-1"); got != "bw346v54ceb5c4up" || got.Validate() != nil {
		t.Errorf("the tag of a site changed to %s: nodes of two versions would not find each other", got)
	}
}

func BenchmarkObserveFlood(b *testing.B) {
	tab := newTable(b, nil)
	for i := range 50 {
		tab.Proven(start, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 7445), nodeN(i))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	h := advert("10.0.0.1:7445")
	now := start
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(100 * time.Microsecond)
		r := rng.Uint32()
		h.Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(r), byte(r >> 8), byte(r >> 16)}), 7445)
		tab.Observe(now, h)
	}
}

func BenchmarkDialsFull(b *testing.B) {
	tab := newTable(b, nil)
	for i := range 256 {
		tab.Proven(start, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), 7445), nodeN(i))
		tab.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i)))
	}
	now := start.Add(2 * time.Minute)
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Second)
		for _, d := range tab.Dials(now) {
			tab.Failed(now, d.Addr, Unreachable)
		}
		tab.Wake(now)
	}
}
