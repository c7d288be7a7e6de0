package dhcp

import (
	"context"
	"encoding/hex"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/muster-edge/muster/pxe"
)

var update = flag.Bool("update", false, "write golden files anew")

// Each golden file is a packet of a client as hex, then "->", then where the
// reply goes and the reply as hex, or "silence".
func TestGoldenPackets(t *testing.T) {
	for _, c := range []struct {
		name  string
		mode  pxe.Mode
		arch  uint16
		port  pxe.Port
		kind  dhcpv4.MessageType
		relay netip.Addr
		// rung is what was tried before (proxy mode).
		rung pxe.Rung
		edit func(*dhcpv4.DHCPv4)
		// before are packets that come first, from the same machine.
		before bool
	}{
		{name: "full-discover-x64", mode: pxe.ModeFull, arch: 7, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "full-request-x64", mode: pxe.ModeFull, arch: 7, port: 67, kind: dhcpv4.MessageTypeRequest, before: true, edit: edits(asks(ip("10.77.0.100")), picks(self))},
		{name: "full-discover-http", mode: pxe.ModeFull, arch: 16, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "full-discover-arm64", mode: pxe.ModeFull, arch: 11, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "full-discover-bios", mode: pxe.ModeFull, arch: 0, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "full-discover-relayed", mode: pxe.ModeFull, arch: 7, port: 67, kind: dhcpv4.MessageTypeDiscover, relay: ip("10.78.0.1")},
		{name: "full-nak", mode: pxe.ModeFull, arch: 7, port: 67, kind: dhcpv4.MessageTypeRequest, edit: asks(ip("192.0.2.7"))},
		{name: "full-nak-relayed", mode: pxe.ModeFull, arch: 7, port: 67, kind: dhcpv4.MessageTypeRequest, relay: ip("10.78.0.1"), edit: asks(ip("192.0.2.7"))},
		{name: "proxy-discover-direct", mode: pxe.ModeProxy, arch: 7, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "proxy-discover-binl", mode: pxe.ModeProxy, arch: 7, port: 67, kind: dhcpv4.MessageTypeDiscover, rung: pxe.RungBINL},
		{name: "proxy-discover-http", mode: pxe.ModeProxy, arch: 16, port: 67, kind: dhcpv4.MessageTypeDiscover},
		{name: "proxy-4011-request", mode: pxe.ModeProxy, arch: 7, port: 4011, kind: dhcpv4.MessageTypeRequest, edit: holds(ip("10.77.0.222"))},
		{name: "proxy-67-request", mode: pxe.ModeProxy, arch: 7, port: 67, kind: dhcpv4.MessageTypeRequest, edit: asks(ip("10.77.0.222"))},
		{name: "proxy-discover-relayed", mode: pxe.ModeProxy, arch: 7, port: 67, kind: dhcpv4.MessageTypeDiscover, relay: ip("10.77.0.254")},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(c.mode)
			var pools []Pool
			if c.mode == pxe.ModeFull {
				pools = []Pool{lanPool("10.77.0.100", "10.77.0.199"),
					{Subnet: netip.MustParsePrefix("10.78.0.0/24"), From: ip("10.78.0.50"), To: ip("10.78.0.60"), Router: ip("10.78.0.1")}}
			}
			s := bare(t, w, "", pools...)
			st := newStation(t, s, 1)
			st.arch, st.relay = c.arch, c.relay
			if c.before {
				st.discover()
			}
			if c.rung != 0 {
				w.ladders[st.mac] = pxe.Ladder{Rung: c.rung, Offered: t0.Add(-time.Second)}
			}
			p := st.packet(c.kind, c.edit)
			from := netip.AddrPortFrom(ip("0.0.0.0"), 68)
			if c.port == 4011 {
				from = netip.AddrPortFrom(ip("10.77.0.222"), 4011)
			}
			in := p.ToBytes()
			out := s.handle(context.Background(), in, from, c.port)
			got := wrap(in) + "->\n"
			if out == nil {
				got += "silence\n"
			} else {
				got += out.to.String() + "\n" + wrap(out.data)
			}
			path := filepath.Join("testdata", c.name+".hex")
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatalf("%v (run with -update to write it)", err)
			}
			if got != string(want) {
				t.Errorf("differs from %s:\n%s\nreply now:\n%s", path, got, summary(out))
			}
		})
	}
}

func wrap(b []byte) string {
	var sb strings.Builder
	for len(b) > 0 {
		n := min(32, len(b))
		sb.WriteString(hex.EncodeToString(b[:n]) + "\n")
		b = b[n:]
	}
	return sb.String()
}

func summary(d *datagram) string {
	if d == nil {
		return "silence"
	}
	p, err := dhcpv4.FromBytes(d.data)
	if err != nil {
		return err.Error()
	}
	return p.Summary()
}

// The golden files are only as good as somebody's reading of them; these are
// the fields firmware looks at.
func TestRepliesHoldWhatFirmwareLooksAt(t *testing.T) {
	w := newWorld(pxe.ModeFull)
	s := bare(t, w, "", lanPool("10.77.0.100", "10.77.0.199"))
	st := newStation(t, s, 1)
	p := st.discover()
	if p == nil {
		t.Fatal("no offer")
	}
	id := st.packet(dhcpv4.MessageTypeDiscover, nil).Options[97]
	for what, ok := range map[string]bool{
		"option 60":       string(p.Options[60]) == "PXEClient",
		"option 43 {6:8}": hex.EncodeToString(p.Options[43]) == "060108ff",
		"option 54":       addr(p.Options[54]) == self,
		"siaddr":          addr(p.ServerIPAddr) == self,
		"file":            p.BootFileName == "amd64/recovery.efi",
		"option 67":       string(p.Options[67]) == "amd64/recovery.efi",
		"option 66":       string(p.Options[66]) == "10.77.0.1",
		"option 97":       string(p.Options[97]) == string(id),
		"mask":            hex.EncodeToString(p.Options[1]) == "ffffff00",
		"router":          addr(p.Options[3]) == self,
		"DNS":             addr(p.Options[6]) == ip("10.77.0.53"),
		"lease 10 min":    p.IPAddressLeaseTime(0) == 10*time.Minute,
		"broadcast flag":  p.IsBroadcast(),
	} {
		if !ok {
			t.Errorf("%s is wrong in\n%s", what, p.Summary())
		}
	}
	st.arch = 16
	st.mac[5]++
	p = st.discover()
	if string(p.Options[60]) != "HTTPClient" || string(p.Options[67]) != "http://10.77.0.1:7480/amd64/recovery.efi" || p.BootFileName != "" || p.Options[43] != nil || p.Options[66] != nil {
		t.Errorf("HTTP offer:\n%s", p.Summary())
	}
}

func TestSmallClientsGetASmallReplyOrNone(t *testing.T) {
	w := newWorld(pxe.ModeFull)
	pool := lanPool("10.77.0.100", "10.77.0.199")
	for range 60 {
		pool.DNS = append(pool.DNS, ip("10.77.0.53"))
	}
	s := bare(t, w, "", pool)
	st := newStation(t, s, 1)
	p, _ := st.send(pxe.PortDHCP, st.packet(dhcpv4.MessageTypeDiscover, opt(57, 0x02, 0x40)))
	if p == nil {
		t.Fatal("no reply at all")
	}
	if n := len(p.ToBytes()) + headers; n > 576 {
		t.Errorf("reply is %d bytes", n)
	}
	if len(p.Options[6]) != 0 || p.Options[67] == nil {
		t.Error("DNS was to go before the boot file")
	}
	p, _ = st.send(pxe.PortDHCP, st.packet(dhcpv4.MessageTypeDiscover, opt(57, 0x05, 0xc0)))
	if len(p.Options[6]) == 0 {
		t.Error("a client with room does not get DNS")
	}
	// What must be echoed can be too much.
	w.policy.Server = self
	p, _ = st.send(pxe.PortDHCP, st.packet(dhcpv4.MessageTypeDiscover, edits(opt(57, 0x02, 0x40), opt(61, make([]byte, 255)...), opt(82, make([]byte, 255)...))))
	if p != nil {
		t.Errorf("a reply of %d bytes to a client that takes 576", len(p.ToBytes()))
	}
}
