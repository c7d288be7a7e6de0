package dhcp

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"pgregory.net/rapid"

	"github.com/muster-edge/muster/pxe"
)

func fullServer(t testing.TB) (*world, *Server) {
	w := newWorld(pxe.ModeFull)
	return w, bare(t, w, "", lanPool("10.77.0.100", "10.77.0.109"))
}

func TestRequestRules(t *testing.T) {
	const silence, ack, nak = dhcpv4.MessageType(0), dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak
	mine, others, free := ip("10.77.0.100"), ip("10.77.0.101"), ip("10.77.0.105")
	for _, c := range []struct {
		name string
		// known: the machine holds mine. Another machine always holds others.
		known bool
		edit  func(*dhcpv4.DHCPv4)
		want  dhcpv4.MessageType
	}{
		{"SELECTING us, its own", true, edits(asks(mine), picks(self)), ack},
		{"SELECTING us, another's", true, edits(asks(others), picks(self)), nak},
		{"SELECTING us, free but not offered", true, edits(asks(free), picks(self)), nak},
		{"SELECTING us, offer forgotten by a restart", false, edits(asks(free), picks(self)), ack},
		{"SELECTING us, another's, no record", false, edits(asks(others), picks(self)), nak},
		{"SELECTING us, our own address", false, edits(asks(self), picks(self)), nak},
		{"SELECTING us, outside the range", false, edits(asks(ip("10.77.0.50")), picks(self)), nak},
		{"SELECTING us, no address", false, picks(self), nak},
		{"SELECTING another server", true, edits(asks(mine), picks(ip("10.77.0.2"))), silence},
		{"INIT-REBOOT, its own", true, asks(mine), ack},
		{"INIT-REBOOT, not its own", true, asks(free), nak},
		{"INIT-REBOOT, wrong network", true, asks(ip("192.168.1.5")), nak},
		{"INIT-REBOOT, wrong network, no record", false, asks(ip("192.168.1.5")), nak},
		{"INIT-REBOOT, no record", false, asks(free), silence},
		{"RENEWING, its own", true, holds(mine), ack},
		{"RENEWING, another's", true, holds(others), nak},
		{"RENEWING, wrong network", true, holds(ip("192.168.1.5")), nak},
		{"RENEWING, no record, free", false, holds(free), ack},
		{"RENEWING, no record, another's", false, holds(others), nak},
		{"RENEWING, no record, outside the range", false, holds(ip("10.77.0.50")), silence},
		{"nothing asked", true, nil, silence},
	} {
		for _, host := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/host=%v", c.name, host), func(t *testing.T) {
				_, s := fullServer(t)
				st, other := newStation(t, s, 1), newStation(t, s, 2)
				st.host = host
				if a := newStation(t, s, 9).dora(); a != mine {
					t.Fatal("the range starts elsewhere")
				}
				s.leases.free(mine)
				if other.dora() != others {
					t.Fatal("unexpected order of the range")
				}
				s.leases.cursor = map[netip.Addr]uint32{}
				if c.known && st.dora() != mine {
					t.Fatal("unexpected order of the range")
				}
				p, to := st.send(pxe.PortDHCP, st.packet(dhcpv4.MessageTypeRequest, c.edit))
				got := silence
				if p != nil {
					got = p.MessageType()
				}
				if got != c.want {
					t.Fatalf("got %s, want %s", got, c.want)
				}
				switch got {
				case nak:
					if !p.YourIPAddr.IsUnspecified() || p.Options[51] != nil || p.Options[60] != nil || to.Addr() != broadcast {
						t.Errorf("NAK to %s:\n%s", to, p.Summary())
					}
				case ack:
					if (p.Options[67] != nil) == host {
						t.Error("boot options go to firmware and to nobody else")
					}
				}
			})
		}
	}
}

func TestRepliesGoWhereTheyMust(t *testing.T) {
	w := newWorld(pxe.ModeFull)
	relayed := Pool{Subnet: netip.MustParsePrefix("10.78.0.0/24"), From: ip("10.78.0.50"), To: ip("10.78.0.60")}
	s := bare(t, w, "", lanPool("10.77.0.100", "10.77.0.109"), relayed)
	st := newStation(t, s, 1)
	if _, to := st.send(67, st.packet(dhcpv4.MessageTypeDiscover, nil)); to.String() != "255.255.255.255:68" {
		t.Errorf("OFFER goes to %s", to)
	}
	a := st.dora()
	if _, to := st.send(67, st.packet(dhcpv4.MessageTypeRequest, holds(a))); to != netip.AddrPortFrom(a, 68) {
		t.Errorf("renewal goes to %s", to)
	}
	if p, to := st.send(67, st.packet(dhcpv4.MessageTypeInform, holds(ip("10.77.0.30")))); to.String() != "10.77.0.30:68" || p.Options[51] != nil || !p.YourIPAddr.IsUnspecified() {
		t.Errorf("INFORM is answered to %s with %v", to, p)
	}
	if p, _ := st.send(67, st.packet(dhcpv4.MessageTypeInform, holds(ip("192.0.2.1")))); p != nil {
		t.Error("INFORM from a foreign address is answered: anybody could be hit through us")
	}
	far := newStation(t, s, 2)
	far.relay = ip("10.78.0.1")
	p, to := far.send(67, far.packet(dhcpv4.MessageTypeDiscover, nil))
	if to.String() != "10.78.0.1:67" || addr(p.GatewayIPAddr) != far.relay || !bytes.Equal(p.Options[82], []byte{1, 4, 'p', 'o', 'r', 't'}) || !relayed.contains(addr(p.YourIPAddr)) {
		t.Errorf("relayed OFFER goes to %s:\n%s", to, p.Summary())
	}
	p, to = far.send(67, far.packet(dhcpv4.MessageTypeRequest, asks(ip("192.0.2.5"))))
	if p.MessageType() != dhcpv4.MessageTypeNak || !p.IsBroadcast() || to.String() != "10.78.0.1:67" {
		t.Errorf("relayed NAK goes to %s:\n%s", to, p.Summary())
	}
	far.relay = ip("203.0.113.1")
	if p, _ := far.send(67, far.packet(dhcpv4.MessageTypeDiscover, nil)); p != nil {
		t.Error("a relay of no served network is answered")
	}
}

func TestOfferSkipsAddressesInUse(t *testing.T) {
	_, s := fullServer(t)
	s.probe = users{ip("10.77.0.100"): {1}, ip("10.77.0.101"): {2}}
	if a := addr(newStation(t, s, 1).discover().YourIPAddr); a != ip("10.77.0.102") {
		t.Errorf("offered %s", a)
	}
	// One that only the asking machine itself answers for is its own.
	st := newStation(t, s, 2)
	s.probe = users{ip("10.77.0.103"): st.mac}
	if a := addr(st.discover().YourIPAddr); a != ip("10.77.0.103") {
		t.Errorf("offered %s", a)
	}
}

func TestDeclineAndRelease(t *testing.T) {
	w, s := fullServer(t)
	st := newStation(t, s, 1)
	a := st.dora()
	// A stranger can decline nothing.
	evil := newStation(t, s, 2)
	evil.send(67, evil.packet(dhcpv4.MessageTypeDecline, edits(asks(a), picks(self))))
	if mac, ok := s.Holder(a); !ok || mac != st.mac {
		t.Fatal("a stranger's DECLINE took the lease away")
	}
	evil.send(67, evil.packet(dhcpv4.MessageTypeRelease, edits(holds(a), picks(self))))
	if _, ok := s.Holder(a); !ok {
		t.Fatal("a stranger's RELEASE took the lease away")
	}
	st.send(67, st.packet(dhcpv4.MessageTypeDecline, edits(asks(a), picks(self))))
	if len(w.alarms()) != 1 {
		t.Errorf("alarms: %v", w.alarms())
	}
	// Not even to one who asks for it by name.
	if p, _ := evil.send(67, evil.packet(dhcpv4.MessageTypeDiscover, asks(a))); p == nil || addr(p.YourIPAddr) == a {
		t.Error("the declined address is offered again")
	}
	if p, _ := evil.send(67, evil.packet(dhcpv4.MessageTypeRequest, holds(a))); p != nil && p.MessageType() == dhcpv4.MessageTypeAck {
		t.Error("the declined address is leased again")
	}
	b := st.dora()
	if b == a {
		t.Fatal("the declined address is leased again")
	}
	st.send(67, st.packet(dhcpv4.MessageTypeRelease, edits(holds(b), picks(self))))
	if len(s.Leases()) != 0 {
		t.Errorf("leases after RELEASE: %v", s.Leases())
	}
	// Both survive a restart.
	s.journal.close()
	again := bare(t, w, s.cfg.Leases, s.cfg.Pools...)
	if len(again.Leases()) != 0 || !again.leases.barred[a].After(w.now) {
		t.Error("RELEASE or DECLINE was forgotten by a restart")
	}
}

func TestAddressesComeBackWhenLeasesEnd(t *testing.T) {
	w, s := fullServer(t)
	for i := range 10 {
		newStation(t, s, i).dora()
	}
	late := newStation(t, s, 50)
	if p := late.discover(); p != nil {
		t.Fatalf("offered %s from a full range", p.YourIPAddr)
	}
	if len(w.alarms()) != 1 {
		t.Error("a full range must be an alarm")
	}
	w.pass(11 * time.Minute)
	late.dora()
	// The first keeps its address if nobody took it.
	if a := newStation(t, s, 5).dora(); a != ip("10.77.0.105") {
		t.Errorf("an expired lease moved to %s", a)
	}
}

func TestALeaseThatCannotBeWrittenIsNotGranted(t *testing.T) {
	_, s := fullServer(t)
	st := newStation(t, s, 1)
	a := addr(st.discover().YourIPAddr)
	s.journal.sync = func(*os.File) error { return errors.New("disk full") }
	if p, _ := st.send(67, st.packet(dhcpv4.MessageTypeRequest, edits(asks(a), picks(self)))); p != nil {
		t.Errorf("answered %s", p.MessageType())
	}
}

func TestTakingAnothersOfferMakesUsLook(t *testing.T) {
	_, s := fullServer(t)
	st := newStation(t, s, 1)
	a := addr(st.discover().YourIPAddr)
	st.send(67, st.packet(dhcpv4.MessageTypeRequest, edits(asks(ip("10.77.0.7")), picks(ip("10.77.0.2")))))
	select {
	case <-s.hint:
	default:
		t.Error("no search was asked for")
	}
	if _, held := s.Holder(a); held {
		t.Error("the promise to a machine that went elsewhere stays")
	}
}

func TestProxyHandlesOnlyItsPart(t *testing.T) {
	w := newWorld(pxe.ModeProxy)
	s := bare(t, w, "")
	st := newStation(t, s, 1)
	p, to := st.send(67, st.packet(dhcpv4.MessageTypeDiscover, nil))
	if p == nil || !p.YourIPAddr.IsUnspecified() || p.Options[51] != nil || to.String() != "255.255.255.255:68" {
		t.Fatalf("proxy offer to %s: %v", to, p)
	}
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeDecline, dhcpv4.MessageTypeRelease, dhcpv4.MessageTypeInform} {
		if p, _ := st.send(67, st.packet(kind, holds(ip("10.77.0.222")))); p != nil {
			t.Errorf("%s on port 67 is answered", kind)
		}
	}
	p, to = st.send(4011, st.packet(dhcpv4.MessageTypeRequest, holds(ip("10.77.0.222"))))
	if p == nil || p.MessageType() != dhcpv4.MessageTypeAck || p.BootFileName != "amd64/recovery.efi" || to.String() != "10.77.0.222:4011" {
		t.Errorf("4011 answers to %s: %v", to, p)
	}
	host := newStation(t, s, 2)
	host.host = true
	if p := host.discover(); p != nil {
		t.Error("an operating system is answered")
	}
}

func TestDeniedMachinesGetNothing(t *testing.T) {
	for _, mode := range []pxe.Mode{pxe.ModeFull, pxe.ModeProxy} {
		w := newWorld(mode)
		w.policy.Standing = pxe.Denied
		var pools []Pool
		if mode == pxe.ModeFull {
			pools = []Pool{lanPool("10.77.0.100", "10.77.0.109")}
		}
		s := bare(t, w, "", pools...)
		for kind := range 20 {
			for _, port := range []pxe.Port{67, 4011} {
				for _, host := range []bool{false, true} {
					st := newStation(t, s, 1000*kind+int(port))
					st.host = host
					for _, e := range []func(*dhcpv4.DHCPv4){nil, asks(ip("10.77.0.100")), asks(ip("192.0.2.1")), holds(ip("10.77.0.100")), edits(asks(ip("10.77.0.100")), picks(self))} {
						if p, _ := st.send(port, st.packet(dhcpv4.MessageType(kind), e)); p != nil {
							t.Fatalf("mode %s: message type %d on port %d is answered", mode, kind, port)
						}
					}
				}
			}
		}
	}
}

func TestFloodOfOneMACIsCut(t *testing.T) {
	w, s := fullServer(t)
	st := newStation(t, s, 1)
	n := 0
	for range 100 {
		if st.discover() != nil {
			n++
		}
	}
	if n != burst {
		t.Errorf("%d of 100 were answered, want %d", n, burst)
	}
	if newStation(t, s, 2).discover() == nil {
		t.Error("another machine suffers")
	}
	w.pass(time.Second)
	if st.discover() == nil {
		t.Error("the machine is not answered again later")
	}
	l := newLimiter()
	for i := range 3 * maxBuckets {
		l.allow(t0, pxe.MAC{2, 0, byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)})
		if len(l.buckets) > maxBuckets {
			t.Fatal("memory is not bounded")
		}
	}
}

// Any row of packets from any machines: no address belongs to two of them,
// and every reply carries the request's xid, chaddr and giaddr.
func TestLeaseProperties(t *testing.T) {
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		w := newWorld(pxe.ModeFull)
		pools := []Pool{lanPool("10.77.0.100", "10.77.0.104"),
			{Subnet: netip.MustParsePrefix("10.78.0.0/29"), From: ip("10.78.0.2"), To: ip("10.78.0.4")}}
		path := filepath.Join(dir, fmt.Sprint(n))
		s := bare(t, w, path, pools...)
		s.journal.sync = func(*os.File) error { return nil }
		// acked is what machines believe they hold.
		type belief struct {
			mac   pxe.MAC
			until time.Time
		}
		acked := map[netip.Addr]belief{}
		addrs := []netip.Addr{ip("10.77.0.99"), ip("10.77.0.100"), ip("10.77.0.101"), ip("10.77.0.104"), ip("10.77.0.105"), ip("10.78.0.2"), ip("10.78.0.4"), self, ip("192.0.2.1")}
		for range rapid.IntRange(1, 60).Draw(rt, "packets") {
			w.pass(time.Duration(rapid.IntRange(0, 300).Draw(rt, "pause")) * time.Second)
			if rapid.IntRange(0, 15).Draw(rt, "restart") == 0 {
				s.journal.close()
				s = bare(t, w, path, pools...)
				s.journal.sync = func(*os.File) error { return nil }
			}
			st := newStation(t, s, rapid.IntRange(1, 8).Draw(rt, "machine"))
			st.host = rapid.Bool().Draw(rt, "host")
			if rapid.IntRange(0, 3).Draw(rt, "relayed") == 0 {
				st.relay = ip("10.78.0.1")
			}
			kind := rapid.SampledFrom([]dhcpv4.MessageType{1, 1, 3, 3, 3, 4, 7, 8}).Draw(rt, "kind")
			var e []func(*dhcpv4.DHCPv4)
			if rapid.Bool().Draw(rt, "asks") {
				e = append(e, asks(rapid.SampledFrom(addrs).Draw(rt, "asked")))
			}
			if rapid.Bool().Draw(rt, "picks") {
				e = append(e, picks(rapid.SampledFrom([]netip.Addr{self, self, ip("10.77.0.2")}).Draw(rt, "server")))
			}
			if rapid.IntRange(0, 2).Draw(rt, "holds") == 0 {
				e = append(e, holds(rapid.SampledFrom(addrs).Draw(rt, "held")))
			}
			p := st.packet(kind, edits(e...))
			r, _ := st.send(pxe.PortDHCP, p)
			if kind == dhcpv4.MessageTypeRelease || kind == dhcpv4.MessageTypeDecline {
				for a, b := range acked {
					if b.mac == st.mac && picksUs(p) && (a == addr(p.ClientIPAddr) || a == addr(p.Options[50])) {
						delete(acked, a)
					}
				}
			}
			if r == nil {
				continue
			}
			if r.TransactionID != p.TransactionID || !bytes.Equal(r.ClientHWAddr, p.ClientHWAddr) || !r.GatewayIPAddr.Equal(p.GatewayIPAddr) ||
				!bytes.Equal(r.Options[82], p.Options[82]) || !bytes.Equal(r.Options[61], p.Options[61]) || !bytes.Equal(r.Options[97], p.Options[97]) {
				rt.Fatalf("reply does not mirror its request:\n%s\n%s", p.Summary(), r.Summary())
			}
			a := addr(r.YourIPAddr)
			if r.MessageType() == dhcpv4.MessageTypeNak || !a.IsValid() {
				continue
			}
			if b, held := acked[a]; held && b.mac != st.mac && w.now.Before(b.until) {
				rt.Fatalf("%s offers %s to %s, but %s holds it until %s", r.MessageType(), a, st.mac, b.mac, b.until)
			}
			if a == self || !pools[0].contains(a) && !pools[1].contains(a) {
				rt.Fatalf("leased %s", a)
			}
			if r.MessageType() == dhcpv4.MessageTypeAck {
				acked[a] = belief{st.mac, w.now.Add(r.IPAddressLeaseTime(0))}
			}
		}
		seen := map[netip.Addr]bool{}
		for _, l := range s.Leases() {
			if seen[l.IP] || s.leases.byIP[l.IP].mac != l.MAC {
				rt.Fatalf("%s is leased twice", l.IP)
			}
			seen[l.IP] = true
		}
		s.journal.close()
	})
}

func picksUs(p *dhcpv4.DHCPv4) bool { return addr(p.Options[54]) == self }

func TestManyAtOnce(t *testing.T) {
	w := newWorld(pxe.ModeFull)
	s := bare(t, w, "", lanPool("10.77.0.50", "10.77.0.250"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[netip.Addr]int{}
	for i := range 200 {
		wg.Go(func() {
			a := newStation(t, s, i).dora()
			mu.Lock()
			got[a]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(got) != 200 {
		t.Errorf("200 machines hold %d addresses", len(got))
	}
}

func FuzzHandle(f *testing.F) {
	w := newWorld(pxe.ModeFull)
	s := bare(f, w, "", lanPool("10.77.0.100", "10.77.0.109"))
	s.journal.sync = func(*os.File) error { return nil }
	st := newStation(f, s, 1)
	for _, kind := range []dhcpv4.MessageType{1, 3, 4, 7, 8} {
		f.Add(st.packet(kind, nil).ToBytes(), uint16(67))
		f.Add(st.packet(kind, edits(asks(ip("10.77.0.100")), picks(self), opt(82, 1, 2, 3))).ToBytes(), uint16(4011))
	}
	f.Add([]byte{}, uint16(67))
	f.Fuzz(func(t *testing.T, b []byte, port uint16) {
		w.pass(time.Minute)
		_, req, err := Parse(b, pxe.Port(port))
		if err == nil && (len(req.Archs) > maxArchs || len(req.VendorClass) > 255 || len(req.MachineID) > 255) {
			t.Fatal("a field is not capped")
		}
		d := s.handle(t.Context(), b, netip.AddrPortFrom(ip("10.77.0.222"), 4011), pxe.Port(port))
		if d == nil {
			return
		}
		if err != nil {
			t.Fatal("a packet that does not parse is answered")
		}
		p, err := dhcpv4.FromBytes(d.data)
		if err != nil {
			t.Fatalf("reply does not parse: %v", err)
		}
		if p.OpCode != dhcpv4.OpcodeBootReply || !bytes.Equal(p.ClientHWAddr, req.MAC[:]) {
			t.Fatal("reply is for somebody else")
		}
		if len(d.data) > maxPacket || !s.trusted(d.to.Addr()) && d.to.Addr() != broadcast {
			t.Fatalf("%d bytes to %s", len(d.data), d.to)
		}
	})
}

func BenchmarkDORA(b *testing.B) {
	for _, c := range []struct {
		name string
		sync func(*os.File) error
	}{{"fsync", (*os.File).Sync}, {"nosync", func(*os.File) error { return nil }}} {
		b.Run(c.name, func(b *testing.B) {
			w := newWorld(pxe.ModeFull)
			pool := Pool{Subnet: netip.MustParsePrefix("10.77.0.0/16"), From: ip("10.77.1.0"), To: ip("10.77.255.0")}
			s := bare(b, w, "", pool)
			s.journal.sync = c.sync
			b.ReportAllocs()
			var mu sync.Mutex
			n := 0
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					mu.Lock()
					n++
					i := n % 50000
					if i == 0 {
						w.pass(time.Hour)
					}
					mu.Unlock()
					newStation(b, s, i).dora()
				}
			})
		})
	}
}
