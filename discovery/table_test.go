package discovery

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

var (
	start   = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	siteTag = Tag("default", "shop-1")
)

func nodeN(i int) fleet.NodeID {
	var h fleet.EKHash
	h[0], h[1] = byte(i>>8), byte(i)
	return h.NodeID()
}

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func newTable(t testing.TB, change func(*Config)) *Table {
	t.Helper()
	cfg := Config{Tag: siteTag}
	if change != nil {
		change(&cfg)
	}
	tab, err := New(cfg, rand.NewPCG(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func advert(addr string) Hint {
	return Hint{Source: SourceMulticast, Addr: at(addr), Tag: siteTag, Instance: "abcdefghijklmnop", TTL: AdvertTTL}
}

func TestObserve(t *testing.T) {
	for _, c := range []struct {
		when string
		hint Hint
		then Outcome
	}{
		{"an advert of our site", advert("10.0.0.1:7445"), Added},
		{"an advert of another site", Hint{Source: SourceMulticast, Addr: at("10.0.0.1:7445"), Tag: Tag("default", "shop-2")}, WrongSite},
		{"an advert without a site", Hint{Source: SourceMulticast, Addr: at("10.0.0.1:7445")}, WrongSite},
		{"a configured address needs no tag", Hint{Source: SourceConfigured, Addr: at("10.0.0.1:7445")}, Added},
		{"a configured address with a foreign tag", Hint{Source: SourceConfigured, Addr: at("10.0.0.1:7445"), Tag: "x"}, WrongSite},
		{"a peer's word", Hint{Source: SourcePeer, Via: nodeN(1), Addr: at("10.0.0.1:7445")}, Added},
		{"a peer's word without the peer", Hint{Source: SourcePeer, Addr: at("10.0.0.1:7445")}, BadSource},
		{"an unknown source", Hint{Source: 9, Addr: at("10.0.0.1:7445")}, BadSource},
		{"no port", advert("10.0.0.1:0"), BadAddress},
		{"no address", Hint{Source: SourceMulticast, Tag: siteTag}, BadAddress},
		{"multicast address", advert("224.0.0.251:7445"), BadAddress},
		{"broadcast address", advert("255.255.255.255:7445"), BadAddress},
		{"unspecified address", advert("0.0.0.0:7445"), BadAddress},
		{"loopback", advert("127.0.0.1:7445"), BadAddress},
		{"loopback that a person configured", Hint{Source: SourceConfigured, Addr: at("127.0.0.1:7445")}, Added},
		{"link-local with zone", advert("[fe80::1%eth0]:7445"), Added},
		{"link-local without zone", advert("[fe80::1]:7445"), BadAddress},
		{"a zone too long for an interface", advert("[fe80::1%eth0eth0eth0eth0]:7445"), BadAddress},
		{"goodbye of an unknown address", Hint{Source: SourceMulticast, Addr: at("10.0.0.1:7445"), Tag: siteTag, Goodbye: true}, Withdrawn},
	} {
		tab := newTable(t, nil)
		if got := tab.Observe(start, c.hint); got != c.then {
			t.Errorf("when %s: %s, want %s", c.when, got, c.then)
		}
		if n := len(tab.Addresses()); (n == 1) != (c.then == Added) {
			t.Errorf("when %s: %d addresses", c.when, n)
		}
	}
}

func TestMappedAndZonedAddressesAreOne(t *testing.T) {
	tab := newTable(t, nil)
	tab.Observe(start, advert("10.0.0.1:7445"))
	if o := tab.Observe(start, advert("[::ffff:10.0.0.1]:7445")); o != Refreshed {
		t.Errorf("IPv4-mapped form: %s", o)
	}
	tab.Observe(start, advert("[2001:db8::1]:7445"))
	if o := tab.Observe(start, advert("[2001:db8::1%eth0]:7445")); o != Refreshed {
		t.Errorf("global address with a zone: %s", o)
	}
}

func TestConfigReportsAllProblems(t *testing.T) {
	_, err := New(Config{Tag: "short", MaxHeard: -1, Recheck: -time.Second, BackOffMin: time.Hour, Known: Rate{PerSecond: -1, Burst: 1}}, rand.NewPCG(1, 2))
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"site tag", "MaxHeard", "Recheck", "BackOffKnown", "BackOffHint", "Known.PerSecond"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
	if _, err := New(Config{Tag: siteTag}, rand.NewPCG(1, 2)); err != nil {
		t.Errorf("zero values are the defaults: %v", err)
	}
}

func TestMovesNeverForgetWhatWasProven(t *testing.T) {
	for _, from := range []State{Proven, Doubted} {
		for ev := dialled; ev <= goodbye; ev++ {
			if to := moves[from][ev]; to != Proven && to != Doubted {
				t.Errorf("%s goes to %s", from, to)
			}
		}
	}
	for from := Hinted; from <= Doubted; from++ {
		if to := moves[from][answered]; to != Proven {
			t.Errorf("an answer moves %s to %s", from, to)
		}
		for ev := dialled; ev <= goodbye; ev++ {
			if from <= Tried && ev != answered && moves[from][ev] >= Proven {
				t.Errorf("%s became %s without an answer", from, moves[from][ev])
			}
		}
	}
}

func TestBackOffGrows(t *testing.T) {
	tab := newTable(t, nil)
	tab.Observe(start, advert("10.0.0.1:7445"))
	now := start
	var gaps []time.Duration
	var last time.Time
	for range 14 {
		wake, ok := tab.Wake(now)
		if !ok {
			t.Fatal("nothing to wake for")
		}
		now = wake
		ds := tab.Dials(now)
		if len(ds) != 1 {
			t.Fatalf("%d dials at Wake's time", len(ds))
		}
		if !last.IsZero() {
			gaps = append(gaps, now.Sub(last))
		}
		last = now
		tab.Failed(now, ds[0].Addr, Unreachable)
	}
	want := time.Second
	for i, g := range gaps {
		if g < want*3/4 || g > want*5/4 {
			t.Errorf("gap %d is %s, want about %s", i, g, want)
		}
		want = min(2*want, 5*time.Minute)
	}
}

func TestANodeIsDialledAtOneAddress(t *testing.T) {
	tab := newTable(t, nil)
	addrs := []string{"10.0.0.1:7445", "[fe80::1%eth0]:7445", "[2001:db8::1]:7445"}
	for _, a := range addrs {
		tab.Proven(start, at(a), nodeN(1))
	}
	p := tab.Peers()
	if len(p) != 1 || len(p[0].Addrs) != 3 || p[0].Addrs[2] != at("[fe80::1%eth0]:7445") {
		t.Fatalf("peers %+v: want one, its link-local address last", p)
	}
	if d := tab.Dials(start.Add(59 * time.Second)); len(d) != 0 {
		t.Errorf("dialled before Recheck: %v", d)
	}
	d := tab.Dials(start.Add(70 * time.Second))
	if len(d) != 1 || d[0].Why != Recheck || d[0].Addr != p[0].Addrs[0] || d[0].Node != nodeN(1) {
		t.Fatalf("recheck: %+v, want one dial of %s", d, p[0].Addrs[0])
	}
	// It fails there: the others are dialled at once.
	now := start.Add(70*time.Second + 100*time.Millisecond)
	tab.Failed(now, d[0].Addr, Unreachable)
	d = tab.Dials(now)
	if len(d) != 2 || d[0].Node != nodeN(1) || d[0].Why != Doubt {
		t.Fatalf("after a failure: %+v, want its two other addresses", d)
	}
	tab.Failed(now, at("[2001:db8::1]:7445"), Unreachable)
	tab.Proven(now, at("[fe80::1%eth0]:7445"), nodeN(1))
	if got := tab.Peers()[0].Addrs[0]; got != at("[fe80::1%eth0]:7445") {
		t.Errorf("prefers %s, which does not answer", got)
	}
}

func TestAnAddressThatMoves(t *testing.T) {
	tab := newTable(t, nil)
	tab.Proven(start, at("10.0.0.1:7445"), nodeN(1))
	tab.Proven(start.Add(time.Second), at("10.0.0.1:7445"), nodeN(2))
	p := tab.Peers()
	if len(p) != 1 || p[0].Node != nodeN(2) || p[0].State != Proven {
		t.Errorf("peers %+v, want node 2 alone", p)
	}
}

func TestGoodbye(t *testing.T) {
	tab := newTable(t, nil)
	bye := advert("10.0.0.1:7445")
	bye.Goodbye = true
	tab.Observe(start, advert("10.0.0.1:7445"))
	tab.Observe(start, bye)
	if n := len(tab.Addresses()); n != 0 {
		t.Errorf("an advert is still there after its goodbye: %d", n)
	}
	// A proven peer stays, and is looked at soon, but not more often than MinGap.
	tab.Proven(start, at("10.0.0.1:7445"), nodeN(1))
	dials := 0
	for ms := 0; ms < 20_000; ms += 10 {
		now := start.Add(time.Duration(ms) * time.Millisecond)
		tab.Observe(now, bye)
		for _, d := range tab.Dials(now) {
			dials++
			tab.Proven(now, d.Addr, nodeN(1))
		}
	}
	if len(tab.Peers()) != 1 {
		t.Fatal("goodbyes removed a proven peer")
	}
	if dials < 1 || dials > 4 {
		t.Errorf("%d dials in 20 s of goodbyes, want 1 to 4 (one per MinGap)", dials)
	}
}

func TestRestartIsNotSatOut(t *testing.T) {
	run := func(instance string) time.Duration {
		tab := newTable(t, nil)
		tab.Observe(start, advert("10.0.0.1:7445"))
		now := start
		for range 10 {
			now, _ = tab.Wake(now)
			for _, d := range tab.Dials(now) {
				tab.Failed(now, d.Addr, Unreachable)
			}
		}
		h := advert("10.0.0.1:7445")
		h.Instance = instance
		tab.Observe(now, h)
		wake, _ := tab.Wake(now)
		return wake.Sub(now)
	}
	if d := run("qrstuvwxyz234567"); d > 5*time.Second {
		t.Errorf("after a restart the next dial is %s away", d)
	}
	if d := run("abcdefghijklmnop"); d < time.Minute {
		t.Errorf("the same advert again brought the next dial to %s", d)
	}
}

func TestStrangersAndOurselvesAreLeftAlone(t *testing.T) {
	for _, f := range []Failure{Stranger, Self} {
		tab := newTable(t, nil)
		tab.Observe(start, advert("10.0.0.1:7445"))
		now := start.Add(time.Second)
		tab.Dials(now)
		tab.Failed(now, at("10.0.0.1:7445"), f)
		if wake, _ := tab.Wake(now); wake.Sub(now) < 3*time.Minute {
			t.Errorf("failure %d: dialled again after %s", f, wake.Sub(now))
		}
		// One of our peers that somebody stands in for is not given up.
		tab.Proven(now, at("10.0.0.2:7445"), nodeN(1))
		tab.Failed(now, at("10.0.0.2:7445"), f)
		if p := tab.Peers(); len(p) != 1 || p[0].State != Doubted {
			t.Errorf("failure %d: peers %+v, want one doubted", f, p)
		}
	}
}

func TestForgedPortsDoNotHideTheUsualOne(t *testing.T) {
	tab := newTable(t, nil)
	for p := 1; p < 200; p++ {
		tab.Observe(start, advert(fmt.Sprintf("10.0.0.1:%d", p)))
	}
	if n := len(tab.Addresses()); n != maxPorts {
		t.Fatalf("%d ports of one host kept", n)
	}
	if o := tab.Observe(start, advert("10.0.0.1:7445")); o != Added {
		t.Errorf("the usual port: %s", o)
	}
	if o := tab.Observe(start, advert("10.0.0.1:99")); o != ManyPorts && o != Refreshed {
		t.Errorf("one more: %s", o)
	}
	tab.Observe(start, advert("10.0.0.1:100"))
	found := false
	for _, a := range tab.Addresses() {
		found = found || a.Addr == at("10.0.0.1:7445")
	}
	if !found {
		t.Error("the usual port was pushed out")
	}
}

func TestWholeSubnetFits(t *testing.T) {
	tab := newTable(t, nil)
	for i := 1; i < 255; i++ {
		if o := tab.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i))); o != Added {
			t.Fatalf("host %d: %s", i, o)
		}
	}
	full := newTable(t, func(c *Config) { c.MaxHeard = 4 })
	for i := 1; i < 255; i++ {
		full.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i)))
	}
	if n := len(full.Addresses()); n != 4 {
		t.Errorf("%d addresses, want 4", n)
	}
	if full.Counters().Hints["pool full"] == 0 {
		t.Error("refused hints are not counted")
	}
}

func TestAPeerCannotPushOutOthersWords(t *testing.T) {
	tab := newTable(t, func(c *Config) { c.MaxTold, c.MaxToldBy = 8, 6 })
	tell := func(by int, from, to int) {
		for i := from; i < to; i++ {
			tab.Observe(start.Add(time.Duration(i)), Hint{Source: SourcePeer, Via: nodeN(by), Addr: at(fmt.Sprintf("10.%d.0.%d:7445", by, i))})
		}
	}
	tell(1, 0, 3)
	tell(2, 0, 200)
	by := map[byte]int{}
	for _, a := range tab.Addresses() {
		by[a.Addr.Addr().As4()[1]]++
	}
	if by[1] != 3 || by[2] != 5 {
		t.Errorf("places by teller: %v, want 3 and 5", by)
	}
	tab.Forget(start, nodeN(2))
	if n := len(tab.Addresses()); n != 3 {
		t.Errorf("after Forget of the talker %d addresses, want 3", n)
	}
}

func TestKindsHaveTheirOwnRate(t *testing.T) {
	tab := newTable(t, nil)
	for i := range 250 {
		tab.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i+1)))
	}
	now := start.Add(time.Second)
	if n := len(tab.Dials(now)); n != 32 {
		t.Fatalf("%d dials by adverts at once, want the burst of 32", n)
	}
	tab.Observe(now, Hint{Source: SourceConfigured, Addr: at("10.9.0.1:7445")})
	tab.Observe(now, Hint{Source: SourcePeer, Via: nodeN(1), Addr: at("10.9.0.2:7445")})
	now = now.Add(250 * time.Millisecond)
	got := map[Why]int{}
	for _, d := range tab.Dials(now) {
		got[d.Why]++
	}
	if got[FromConfig] != 1 || got[FromPeer] != 1 || got[FromAdvert] > 2 {
		t.Errorf("dials %v: a queue of adverts delayed others, or broke its rate", got)
	}
}

func TestMemoryFindsPeersAgain(t *testing.T) {
	tab := newTable(t, nil)
	tab.Proven(start, at("10.0.0.1:7445"), nodeN(1))
	tab.Proven(start.Add(time.Second), at("10.0.0.2:7445"), nodeN(2))
	tab.Proven(start.Add(2*time.Second), at("[fe80::2%eth0]:7445"), nodeN(2))
	tab.Observe(start, advert("10.0.0.9:7445"))
	b, err := json.Marshal(tab.Memory())
	if err != nil {
		t.Fatal(err)
	}
	m, err := ParseMemory(b)
	if err != nil {
		t.Fatal(err)
	}
	again := newTable(t, nil)
	again.Restore(start, m)
	if p := again.Peers(); len(p) != 2 || p[0].State != Doubted || len(p[1].Addrs) != 2 {
		t.Fatalf("peers after a restart: %+v", p)
	}
	ds := again.Dials(start.Add(time.Second))
	if len(ds) != 3 {
		t.Fatalf("dials after a restart: %+v", ds)
	}
	for _, d := range ds {
		if d.Why != FromMemory || d.Node == "" {
			t.Errorf("dial %+v", d)
		}
	}
	b2, _ := json.Marshal(again.Memory())
	if again.Restore(start, m); len(again.Addresses()) != 3 || string(b2) == "" {
		t.Error("restoring twice adds")
	}
}

func TestParseMemoryRefuses(t *testing.T) {
	n := string(nodeN(1))
	for _, c := range []struct{ when, in string }{
		{"nothing", ``},
		{"another format", `{"format":"muster/peers/v2","peers":[]}`},
		{"unknown field", `{"format":"muster/peers/v1","peers":[],"x":1}`},
		{"trailing bytes", `{"format":"muster/peers/v1","peers":[]}{}`},
		{"bad node", `{"format":"muster/peers/v1","peers":[{"node":"n-1","addrs":[]}]}`},
		{"bad address", `{"format":"muster/peers/v1","peers":[{"node":"` + n + `","addrs":["10.0.0.1:0"]}]}`},
		{"too long", `{"format":"muster/peers/v1","peers":[]}` + strings.Repeat(" ", maxMemory)},
	} {
		if _, err := ParseMemory([]byte(c.in)); err == nil {
			t.Errorf("when %s: no error", c.when)
		}
	}
	if _, err := ParseMemory([]byte(`{"format":"muster/peers/v1","peers":[{"node":"` + n + `","addrs":["10.0.0.1:7445"]}]}`)); err != nil {
		t.Error(err)
	}
}

func TestShare(t *testing.T) {
	tab := newTable(t, nil)
	tab.Proven(start, at("10.0.0.1:7445"), nodeN(1))
	tab.Proven(start.Add(1), at("[fe80::1%eth0]:7445"), nodeN(1))
	tab.Observe(start, advert("10.0.0.9:7445"))
	if s := tab.Share("", 10); len(s) != 1 || s[0].Addr != at("10.0.0.1:7445") {
		t.Errorf("to a peer elsewhere: %v", s)
	}
	if s := tab.Share("eth0", 10); len(s) != 2 || s[0].Addr != at("[fe80::1]:7445") {
		t.Errorf("to a peer on the link: %v", s)
	}
	if s := tab.Share("eth0", 1); len(s) != 1 {
		t.Errorf("limit ignored: %v", s)
	}
}

func TestExpire(t *testing.T) {
	tab := newTable(t, func(c *Config) { c.ForgetAfter = 24 * time.Hour })
	h := advert("10.0.0.1:7445")
	h.TTL = time.Minute
	tab.Observe(start, h)
	h.Addr, h.TTL = at("10.0.0.2:7445"), 1000*time.Hour
	tab.Observe(start, h)
	tab.Observe(start, Hint{Source: SourceConfigured, Addr: at("10.0.0.3:7445")})
	tab.Proven(start, at("10.0.0.4:7445"), nodeN(4))
	for _, c := range []struct {
		after time.Duration
		left  int
	}{{59 * time.Second, 4}, {61 * time.Second, 3}, {76 * time.Minute, 2}, {23 * time.Hour, 2}, {25 * time.Hour, 1}, {10000 * time.Hour, 1}} {
		tab.Expire(start.Add(c.after))
		if n := len(tab.Addresses()); n != c.left {
			t.Errorf("after %s: %d addresses, want %d", c.after, n, c.left)
		}
	}
	if len(tab.Peers()) != 0 {
		t.Error("a node that has not answered for longer than ForgetAfter is still there")
	}
}

func TestPeersAreBounded(t *testing.T) {
	tab := newTable(t, func(c *Config) { c.MaxPeers, c.MaxAddrs = 3, 2 })
	for i := range 10 {
		for a := range 4 {
			tab.Proven(start.Add(time.Duration(i)*time.Second), at(fmt.Sprintf("10.%d.0.%d:7445", i, a+1)), nodeN(i))
		}
	}
	p := tab.Peers()
	if len(p) != 3 || len(tab.Addresses()) != 6 {
		t.Fatalf("%d peers, %d addresses; want 3 and 6", len(p), len(tab.Addresses()))
	}
	for _, x := range p {
		if x.Proven.Before(start.Add(7 * time.Second)) {
			t.Errorf("kept %s of %s, dropped a later one", x.Node, x.Proven)
		}
	}
}

func TestANewcomerAfterAFloodIsDialledSoon(t *testing.T) {
	tab := newTable(t, nil)
	for i := range 250 {
		tab.Observe(start, advert(fmt.Sprintf("10.0.0.%d:7445", i+1)))
	}
	now := start
	for now.Before(start.Add(5 * time.Second)) {
		tab.Dials(now)
		now = now.Add(10 * time.Millisecond)
	}
	tab.Observe(now, advert("10.0.1.1:7445"))
	for end := now.Add(time.Second); now.Before(end); now = now.Add(10 * time.Millisecond) {
		for _, d := range tab.Dials(now) {
			if d.Addr == at("10.0.1.1:7445") {
				return
			}
		}
	}
	t.Error("a newcomer waits behind addresses that nobody answers at")
}
