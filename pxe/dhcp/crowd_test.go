package dhcp

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
)

// strangers is a full-mode server on which nobody is known but friends.
func strangers(t testing.TB, from, to string) (*world, *Server) {
	w := newWorld(pxe.ModeFull)
	w.policy.Standing = pxe.Unknown
	w.friends = map[pxe.MAC]bool{}
	return w, bare(t, w, "", lanPool(from, to))
}

func (w *world) befriend(mac pxe.MAC) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.friends[mac] = true
}

func (c *station) bound() bool {
	o := c.discover()
	if o == nil {
		return false
	}
	k, _ := c.send(67, c.packet(dhcpv4.MessageTypeRequest, edits(asks(addr(o.YourIPAddr)), picks(self))))
	return k != nil && k.MessageType() == dhcpv4.MessageTypeAck
}

// Invented machines take what strangers may have; known machines still get an
// address, those that had one keep it, and the rest comes back within minutes.
func TestStarvation(t *testing.T) {
	w, s := strangers(t, "10.77.0.100", "10.77.0.179") // 80, of which 10 are kept
	early := newStation(t, s, 1)
	kept := early.dora()
	got := 0
	for i := range 2000 {
		if newStation(t, s, 1000+i).bound() {
			got++
		}
		if i%50 == 49 {
			w.pass(100 * time.Millisecond)
		}
	}
	if got != 69 {
		t.Errorf("invented machines took %d addresses of the 69 that are left for strangers", got)
	}
	for i := range 10 {
		c := newStation(t, s, 100+i)
		w.befriend(c.mac)
		if !c.bound() {
			t.Errorf("known machine %d gets no address", i)
		}
	}
	renewal, _ := early.send(67, early.packet(dhcpv4.MessageTypeRequest, holds(kept)))
	if renewal == nil || renewal.MessageType() != dhcpv4.MessageTypeAck {
		t.Error("a machine that had an address cannot renew it")
	}
	// The addresses an attacker has not paid for with a REQUEST go to a
	// known machine even when nothing else is left.
	if newStation(t, s, 500).discover() != nil {
		t.Error("a stranger gets one of the addresses that are kept")
	}
	alarms := w.alarms()
	for _, want := range []string{"no address left for unknown machines", "inventing them"} {
		n := 0
		for _, e := range alarms {
			if strings.Contains(e.Text, want) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d alarms say %q, want 1", n, want)
		}
	}
	if len(s.limit.buckets) > maxBuckets || len(s.leases.byMAC) > 80 || len(s.leases.byIP) > 80 || len(s.crowd.places) > maxPlaces {
		t.Error("memory is not bounded")
	}
	// The attack is over: half of what was taken before the pressure has
	// leases of 10 minutes, the rest is back after the probation.
	w.pass(probation)
	back := 0
	for i := range 40 {
		if newStation(t, s, 600+i).bound() {
			back++
		}
	}
	if back < 30 {
		t.Errorf("%d addresses are back %s after the attack", back, probation)
	}
}

// The twin: as many honest machines as the range is for all get a full lease
// in time, and there is no alarm.
func TestHonestCrowdIsNoStarvation(t *testing.T) {
	w, s := strangers(t, "10.77.0.10", "10.77.0.249")
	for i := range 200 {
		if !newStation(t, s, i).bound() {
			t.Fatalf("machine %d of 200 in the same second gets no address", i)
		}
	}
	if a := w.alarms(); len(a) != 0 {
		t.Errorf("alarm: %s", a[0])
	}
	for _, l := range s.Leases() {
		if d := l.Expires.Sub(w.now); d < probation {
			t.Errorf("a lease of %s", d)
		}
	}
}

// A promise nobody took goes to a known machine when all else is gone.
func TestPromisesGiveWay(t *testing.T) {
	w, s := strangers(t, "10.77.0.100", "10.77.0.107") // 8, of which 1 is kept
	for i := range 20 {
		newStation(t, s, 100+i).discover()
	}
	a, b := newStation(t, s, 1), newStation(t, s, 2)
	w.befriend(a.mac)
	w.befriend(b.mac)
	if !a.bound() || !b.bound() {
		t.Error("known machines get nothing beside promises that nobody took")
	}
	// Leases do not.
	w2, s2 := strangers(t, "10.77.0.100", "10.77.0.107")
	for i := range 20 {
		newStation(t, s2, 100+i).bound()
	}
	c, d := newStation(t, s2, 1), newStation(t, s2, 2)
	w2.befriend(c.mac)
	w2.befriend(d.mac)
	if !c.bound() || d.bound() {
		t.Error("a lease was taken from a stranger, or the kept address is not to be had")
	}
}

// A REQUEST out of the blue is no way around.
func TestStrangersCannotTakeWhatWasNotOffered(t *testing.T) {
	_, s := strangers(t, "10.77.0.100", "10.77.0.107")
	for i := range 20 {
		newStation(t, s, 100+i).bound()
	}
	c := newStation(t, s, 1)
	for a := range 8 {
		want := netip.AddrFrom4([4]byte{10, 77, 0, byte(100 + a)})
		if k, _ := c.send(67, c.packet(dhcpv4.MessageTypeRequest, edits(asks(want), picks(self)))); k != nil && k.MessageType() == dhcpv4.MessageTypeAck {
			t.Errorf("took %s without an offer", want)
		}
	}
}

// Machines behind one relay port cannot use up the tokens of another.
func TestPlacesAreApart(t *testing.T) {
	c := newCrowd()
	relay, other := ip("10.77.9.1"), ip("10.77.8.1")
	for range 2 * strangersBurst {
		c.admit(t0, relay, []byte("port 1"))
	}
	if c.admit(t0, relay, []byte("port 1")) {
		t.Error("a place has tokens without end")
	}
	if !c.admit(t0, relay, []byte("port 2")) || !c.admit(t0, other, []byte("port 1")) || !c.admit(t0, netip.Addr{}, nil) {
		t.Error("a flood at one place stops another")
	}
	if !c.admit(t0.Add(time.Second), relay, []byte("port 1")) {
		t.Error("the place is never served again")
	}
	for i := range 10 * maxPlaces {
		c.admit(t0, relay, binary.BigEndian.AppendUint32(nil, uint32(i)))
	}
	if len(c.places) > maxPlaces+1 {
		t.Errorf("%d places are remembered", len(c.places))
	}
}

// The same on the wire: a neighbour sends DISCOVERs and noise from random
// addresses as fast as it can, and a known machine boots meanwhile.
func TestFloodOnTheWire(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	cfg := live(t, lan, pxe.ModeFull)
	w := cfg.Decider.(*world)
	w.policy.Standing = pxe.Unknown
	good, bad := lan.Host(t), lan.Host(t)
	w.friends = map[pxe.MAC]bool{pxe.MAC(good.MAC): true}
	cfg.ProbeWait = 50 * time.Millisecond
	s := run(t, cfg)
	var heap runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&heap)
	before := heap.HeapAlloc

	stop, sent := make(chan struct{}), atomic.Int64{}
	done := make(chan error, 1)
	go func() {
		done <- bad.Do(func() error {
			raw, err := netlab.RawUDP(bad.Iface)
			if err != nil {
				return err
			}
			defer raw.Close()
			rnd := rand.New(rand.NewPCG(1, 2))
			from, to := netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67")
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				mac := make([]byte, 6)
				binary.BigEndian.PutUint32(mac[2:], rnd.Uint32())
				mac[0] = 2
				p := (&edk2.Client{MAC: mac, Arch: 7}).Packet(dhcpv4.MessageTypeDiscover, dhcpv4.TransactionID{1, 2, 3, 4}).ToBytes()
				if sent.Load()%4 == 3 {
					// Noise: cut or twisted.
					p[rnd.IntN(len(p))] ^= byte(rnd.Uint32())
					p = p[:rnd.IntN(len(p))]
				}
				if err := raw.Send(from, to, p); err != nil {
					continue // the interface's queue is full
				}
				sent.Add(1)
			}
		})
	}()
	netlab.Eventually(t, time.Minute, "the flood is there", func() bool { return sent.Load() > 5000 })
	for try := range 3 {
		fw := &edk2.Client{Iface: good.Iface, MAC: good.MAC, Arch: 7, Wait: []time.Duration{time.Second, 2 * time.Second, 4 * time.Second}}
		var res edk2.Result
		err := good.Do(func() (err error) { res, err = fw.Lease(); return err })
		if err != nil {
			t.Errorf("during the flood, boot %d: %v", try, err)
		}
		if res.Rounds > 2 {
			t.Errorf("boot %d took %d DISCOVERs", try, res.Rounds)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&heap)
	if grown := int64(heap.HeapAlloc) - int64(before); grown > 16<<20 {
		t.Errorf("%d packets leave %d MiB in memory", sent.Load(), grown>>20)
	}
	if n := len(s.Leases()); n > 100 {
		t.Errorf("%d leases of 100 addresses", n)
	}
	if a := w.alarms(); len(a) == 0 || len(a) > 3 {
		t.Errorf("%d alarms", len(a))
	}
	t.Logf("%d packets sent, %d dropped or turned away", sent.Load(), s.drops.Load())
}

func run(t testing.TB, cfg Config) *Server {
	t.Helper()
	cfg.WatchEvery = -1
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}
