package tftp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/tftp"
)

var well = netip.AddrPortFrom(boothost, 69)

// Windows of every size, with and without loss, bring the same file; a client
// that asks for none is given none, and nobody more than asked for or allowed.
func TestWindows(t *testing.T) {
	r := newRig(t, 1_000_001, func(c *tftp.Config) { c.Window = 8 })
	h := r.lan.Host(t, "10.77.0.30/24")
	for _, c := range []struct{ ask, lose, want int }{{1, 0, 1}, {1, 50, 1}, {2, 0, 2}, {4, 0, 4}, {4, 50, 4}, {4, 3, 4}, {8, 0, 8}, {64, 50, 8}} {
		var got [2]int
		data, err := r.read(t, h, name, func(f *edk2.Client) { f.Window, f.Lose = c.ask, c.lose })
		if err != nil || !bytes.Equal(data, r.data) {
			t.Errorf("window %d, losing every %d: %d bytes, %v", c.ask, c.lose, len(data), err)
		}
		if err := h.Do(func() error {
			f := &edk2.Client{Iface: h.Iface, Window: c.ask}
			_, err := f.TFTPRead(boothost, name)
			got = f.Negotiated
			return err
		}); err != nil || got != [2]int{1468, c.want} {
			t.Errorf("asked for a window of %d and got blocks of %d, %d at a time (%v)", c.ask, got[0], got[1], err)
		}
	}
}

func TestBlockNumbersRollOverInAWindow(t *testing.T) {
	if testing.Short() {
		t.Skip("34 MB in small blocks")
	}
	r := newRig(t, 65_600*513, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	data, err := r.read(t, h, name, func(c *edk2.Client) { c.BlockSize, c.Window = 513, 16 })
	if err != nil || !bytes.Equal(data, r.data) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}

// AMI's way to ask for the size: acknowledge the OACK, abort with code 0, and
// ask again from the same port.
func TestAMIProbe(t *testing.T) {
	r := newRig(t, 70_000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	// As part of a whole boot, see the server's tests; here as it goes over
	// the wire.
	err := h.Do(func() error {
		c, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		say := func(b string, to netip.AddrPort) error { _, err := c.WriteToUDPAddrPort([]byte(b), to); return err }
		buf := make([]byte, 2000)
		if err := say("\x00\x01"+name+"\x00octet\x00tsize\x000\x00", well); err != nil {
			return err
		}
		n, first, err := c.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "\x00\x06tsize\x0070000\x00" {
			return fmt.Errorf("OACK %q, %w", buf[:n], err)
		}
		if err := errors.Join(say("\x00\x04\x00\x00", first), say("\x00\x05\x00\x00TFTP Aborted\x00", first)); err != nil {
			return err
		}
		if err := say("\x00\x01"+name+"\x00octet\x00blksize\x001024\x00", well); err != nil {
			return err
		}
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return err
			}
			if from == first {
				continue // the first block of the transfer it gave up
			}
			if string(buf[:n]) != "\x00\x06blksize\x001024\x00" {
				return fmt.Errorf("second OACK %q", buf[:n])
			}
			return say("\x00\x05\x00\x03enough\x00", from)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// Both ended within a moment, each in its own goroutine: nothing says
	// which of them is reported first.
	ends := r.ends(t, 2)
	probe, failed := ends[0], ends[1]
	if failed.Probe {
		probe, failed = failed, probe
	}
	if !probe.Probe || probe.Err != nil {
		t.Errorf("the probe is reported as %+v", probe)
	}
	if failed.Probe || failed.Err == nil || !strings.Contains(failed.Err.Error(), "code=3") {
		t.Errorf("an error that is no probe is reported as %+v", failed)
	}
}

// request sends n requests from n ports of h and stays silent. sources, if
// not nil, gives each an address.
func request(h *netlab.Host, n int, then []byte) error {
	return h.Do(func() error {
		for range n {
			c, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := c.WriteToUDPAddrPort([]byte("\x00\x01"+name+"\x00octet\x00tsize\x000\x00blksize\x001468\x00"), well); err != nil {
				return err
			}
			if then != nil {
				buf := make([]byte, 600)
				_ = c.SetReadDeadline(time.Now().Add(time.Second))
				if _, from, err := c.ReadFromUDPAddrPort(buf); err == nil {
					_, _ = c.WriteToUDPAddrPort(then, from)
				}
			}
		}
		return nil
	})
}

// forge sends requests that nobody will ever answer for: n from n addresses
// and ports of the served network.
func forge(h *netlab.Host, n int) error {
	return h.Do(func() error {
		s, err := netlab.RawUDP(h.Iface)
		if err != nil {
			return err
		}
		defer s.Close()
		rrq := []byte("\x00\x01" + name + "\x00octet\x00tsize\x000\x00blksize\x001468\x00")
		for i := range n {
			src := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(100 + i%150)}), uint16(2000+i))
			if err := s.Send(src, well, rrq); err != nil {
				return err
			}
		}
		return nil
	})
}

// 1,000 requests and not a word more, from one address and from 150 forged
// ones: an honest machine still gets its image, no room is used up, and the silent
// ones are forgotten.
func TestStallStorm(t *testing.T) {
	r := newRig(t, 300_000, func(c *tftp.Config) { c.MaxTransfers = 8 })
	bad, good := r.lan.Host(t, "10.77.0.66/24"), r.lan.Host(t, "10.77.0.30/24")
	before := runtime.NumGoroutine()
	if err := request(bad, 1000, nil); err != nil {
		t.Fatal(err)
	}
	if _, waiting := r.s.Transfers(); waiting > 8 {
		t.Errorf("one address holds %d transfers", waiting)
	}
	if err := forge(bad, 1000); err != nil {
		t.Fatal(err)
	}
	netlab.Eventually(t, 5*time.Second, "the storm is there", func() bool { _, w := r.s.Transfers(); return w > 30 })
	if _, waiting := r.s.Transfers(); waiting > 64 {
		t.Errorf("%d transfers wait for a first answer, 64 may", waiting)
	}
	if n := runtime.NumGoroutine() - before; n > 300 {
		t.Errorf("%d goroutines", n)
	}
	for range 3 {
		if data, err := r.read(t, good, name, nil); err != nil || !bytes.Equal(data, r.data) {
			t.Errorf("during the storm: %d bytes, %v", len(data), err)
		}
	}
	netlab.Eventually(t, 20*time.Second, "the silent ones are forgotten", func() bool {
		r.src.mu.Lock()
		defer r.src.mu.Unlock()
		a, w := r.s.Transfers()
		return a == 0 && w == 0 && r.src.open == 0
	})
	for _, p := range r.progress() {
		if p.Client != netip.MustParseAddr("10.77.0.30") {
			t.Fatalf("a request that nobody stood up for is reported: %+v", p)
		}
	}
}

// Clients that ask, take the options and abort, as fast as they can.
func TestAbortStorm(t *testing.T) {
	r := newRig(t, 300_000, func(c *tftp.Config) { c.MaxTransfers = 8 })
	bad, good := r.lan.Host(t, "10.77.0.66/24"), r.lan.Host(t, "10.77.0.30/24")
	done := make(chan error, 1)
	go func() { done <- request(bad, 55, []byte("\x00\x05\x00\x08User aborted\x00")) }()
	for range 3 {
		if data, err := r.read(t, good, name, nil); err != nil || !bytes.Equal(data, r.data) {
			t.Errorf("during the storm: %d bytes, %v", len(data), err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	netlab.Eventually(t, 20*time.Second, "all are over", func() bool { a, w := r.s.Transfers(); return a+w == 0 })
	for _, p := range r.progress() {
		if p.Err != nil {
			t.Errorf("an abort is an error: %+v", p)
		}
	}
}

// Machines that stop in the middle give way to those that go on.
func TestStalledTransfersGiveWay(t *testing.T) {
	r := newRig(t, 300_000, func(c *tftp.Config) { c.MaxTransfers = 2 })
	bad, good := r.lan.Host(t, "10.77.0.66/24"), r.lan.Host(t, "10.77.0.30/24")
	err := bad.Do(func() error {
		for range 2 {
			c, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			buf := make([]byte, 2000)
			_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
			if _, err := c.WriteToUDPAddrPort([]byte("\x00\x01"+name+"\x00octet\x00"), well); err != nil {
				return err
			}
			_, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return err
			}
			if _, err := c.WriteToUDPAddrPort([]byte{0, 4, 0, 1}, from); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	netlab.Eventually(t, 3*time.Second, "both are under way", func() bool { a, _ := r.s.Transfers(); return a == 2 })
	if _, err := r.read(t, good, name, nil); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("a third at once: %v", err)
	}
	netlab.Eventually(t, 10*time.Second, "an honest machine gets a place", func() bool {
		data, err := r.read(t, good, name, nil)
		return err == nil && bytes.Equal(data, r.data)
	})
}

// Noise on the port: what is no request costs nothing and gets no answer.
func TestMalformedFlood(t *testing.T) {
	r := newRig(t, 100_000, nil)
	bad, good := r.lan.Host(t, "10.77.0.66/24"), r.lan.Host(t, "10.77.0.30/24")
	err := bad.Do(func() error {
		c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(well))
		if err != nil {
			return err
		}
		defer c.Close()
		rnd := rand.New(rand.NewPCG(7, 7))
		seeds := []string{"\x00\x01" + name + "\x00octet\x00blksize\x001468\x00", "\x00\x02x\x00octet\x00", "\x00\x04\x00\x00", "\x00\x01", "", "\x00\x06a\x00b\x00"}
		for i := range 20_000 {
			b := []byte(seeds[i%len(seeds)])
			for range rnd.IntN(4) {
				if len(b) > 0 {
					b[rnd.IntN(len(b))] = byte(rnd.Uint32())
				}
			}
			b = append(b, make([]byte, rnd.IntN(3)*rnd.IntN(700))...)
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if data, err := r.read(t, good, name, nil); err != nil || !bytes.Equal(data, r.data) {
		t.Errorf("after the flood: %d bytes, %v", len(data), err)
	}
	if a, w := r.s.Transfers(); a+w > 8 {
		t.Errorf("%d transfers under way after noise from one address", a+w)
	}
}

// A way that swallows large packets: the first try ends, the next ones use
// smaller blocks. Without the hole, full blocks stay.
func TestBlackHoleForLargePackets(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for timeouts")
	}
	r := newRig(t, 100_000, nil)
	narrow := r.lan.HostOn(t, &netlab.Wire{MaxFrame: 1294}, "10.77.0.30/24")
	wide := r.lan.Host(t, "10.77.0.31/24")
	var got [2]int
	fetch := func(h *netlab.Host) error {
		return h.Do(func() error {
			f := &edk2.Client{Iface: h.Iface}
			data, err := f.TFTPRead(boothost, name)
			got = f.Negotiated
			if err == nil && !bytes.Equal(data, r.data) {
				err = io.ErrUnexpectedEOF
			}
			return err
		})
	}
	if err := fetch(narrow); err == nil {
		t.Fatal("the hole lets large blocks through")
	}
	if err := fetch(narrow); err != nil || got[0] != 1200 {
		t.Errorf("second try: blocks of %d, %v", got[0], err)
	}
	if err := fetch(wide); err != nil || got[0] != 1468 {
		t.Errorf("another machine: blocks of %d, %v", got[0], err)
	}
}

func TestReplyLeavesFromTheAddressThatWasAsked(t *testing.T) {
	r := newRig(t, 3000, nil)
	second := netip.MustParseAddr("10.77.0.9")
	r.lan.Add(t, "10.77.0.9/24")
	h := r.lan.Host(t, "10.77.0.30/24")
	if err := h.Do(func() error {
		_, err := (&edk2.Client{Iface: h.Iface}).TFTPRead(second, name)
		return err
	}); err != nil {
		t.Error(err) // the model refuses answers from elsewhere
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte("\x00\x01" + name + "\x00octet\x00tsize\x000\x00blksize\x001468\x00windowsize\x004\x00"))
	f.Add([]byte("\x00\x01a\x00OcTeT"))
	f.Add([]byte("\x00\x01\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x02a\x00octet\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, block, window, size, err := tftp.ParseRequest(b)
		if err != nil {
			return
		}
		if binary.BigEndian.Uint16(b) != 1 || len(b) > 512 || strings.ContainsRune(name, 0) {
			t.Fatalf("% x is taken", b)
		}
		if block != 0 && (block < 512 || block > 65464) || window < 0 || window > 65535 {
			t.Fatalf("block size %d, window %d, size %v", block, window, size)
		}
	})
}
