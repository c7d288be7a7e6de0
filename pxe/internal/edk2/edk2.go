// Package edk2 is a model of how UEFI firmware built from EDK2 boots from the
// network: which offers UefiPxeBcDxe and HttpBootDxe accept, in which order
// they prefer them, and how they fetch. It is for tests; it runs on a thread
// inside a client's network namespace, so it never starts a goroutine that
// opens a socket.
package edk2

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Client is one firmware.
type Client struct {
	Iface string
	MAC   net.HardwareAddr
	// Arch is 7 for PXE, 16 for HTTP boot on x64.
	Arch uint16
	// HTTP selects HttpBootDxe.
	HTTP bool
	// Roots are the CAs enrolled in the firmware; without any, https is not
	// fetched. Clock is the firmware's, the real time by default.
	Roots *x509.CertPool
	Clock func() time.Time
	// Old is EDK2 before April 2017, which drops proxy PXE10 offers.
	Old bool
	// Deaf ignores proxy offers of every kind, as some vendors' stacks do.
	Deaf bool
	// NoUUID omits option 97.
	NoUUID bool
	// Wait is how long offers are collected in each round (4, 8, 16 and 32 s
	// in real firmware).
	Wait []time.Duration
	// BlockSize is 1468 by default. Lose drops every nth data block received.
	BlockSize int
	Lose      int
	// Window is what is proposed by RFC 7440, 4 by default; 1 proposes none.
	Window int
	// AMI asks for the size in AMI's way.
	AMI bool
	// Negotiated is the block size and the window of the last TFTPRead.
	Negotiated [2]int
	// Impatient sends one REQUEST, and waits half a second for any answer.
	Impatient bool
	// Patience is how long an HTTP download may take, 30 s by default.
	Patience time.Duration
	dry      bool
}

// Result is how a boot went.
type Result struct {
	// Addr is the leased address, Server who leased it.
	Addr, Server netip.Addr
	// Rounds is the number of DISCOVERs sent.
	Rounds int
	// Kind is what was chosen: dhcp-pxe10, proxy-pxe10, dhcp-binl,
	// proxy-binl, dhcp-file, dhcp-http, proxy-http.
	Kind string
	// File is the boot file or URL, Data what was fetched.
	File string
	Data []byte
	// Offered is the time from the first DISCOVER to the end of selection.
	Offered time.Duration
}

// ErrNoOffer is firmware's "PXE-E16: No valid offer received".
var ErrNoOffer = errors.New("edk2: no valid offer received")

type offer struct {
	*dhcpv4.DHCPv4
	from netip.AddrPort
}

func (o offer) class() string { return string(o.Options[60]) }
func (o offer) proxy() bool   { return o.YourIPAddr.IsUnspecified() }
func (o offer) pxe() bool     { return strings.HasPrefix(o.class(), "PXEClient") }
func (o offer) file() string {
	// Option 67 wins over the header field.
	if f := o.Options[67]; len(f) > 0 {
		return strings.TrimRight(string(f), "\x00")
	}
	return o.BootFileName
}

// pxe10 is true with any of the sub-options 6 to 10 in option 43.
func (o offer) pxe10() bool {
	v := o.Options[43]
	for len(v) >= 2 && v[0] != 255 {
		if v[0] == 0 {
			v = v[1:]
			continue
		}
		if len(v) < 2+int(v[1]) {
			return false
		}
		if v[0] >= 6 && v[0] <= 10 {
			return true
		}
		v = v[2+int(v[1]):]
	}
	return false
}

func (o offer) server() netip.Addr {
	if id := o.Options[54]; len(id) == 4 {
		return netip.AddrFrom4([4]byte(id))
	}
	return o.from.Addr()
}

// bootServer is where the file is: siaddr, else option 54.
func (o offer) bootServer() netip.Addr {
	if v4 := o.ServerIPAddr.To4(); v4 != nil && !o.ServerIPAddr.IsUnspecified() {
		return netip.AddrFrom4([4]byte(v4))
	}
	return o.server()
}

// Packet is a DHCP message as the firmware sends it.
func (c *Client) Packet(kind dhcpv4.MessageType, xid dhcpv4.TransactionID) *dhcpv4.DHCPv4 {
	class := fmt.Sprintf("PXEClient:Arch:%05d:UNDI:003001", c.Arch)
	params := []byte{1, 2, 3, 4, 5, 6, 12, 13, 15, 17, 18, 22, 23, 28, 40, 41, 42, 43, 50, 51, 54, 58, 59, 60, 66, 67, 97, 128, 129, 130, 131, 132, 133, 134, 135}
	if c.HTTP {
		class = fmt.Sprintf("HTTPClient:Arch:%05d:UNDI:003001", c.Arch)
		params = []byte{1, 3, 6, 12, 15, 43, 60, 66, 67, 97}
	}
	p := &dhcpv4.DHCPv4{OpCode: dhcpv4.OpcodeBootRequest, HWType: iana.HWTypeEthernet, ClientHWAddr: c.MAC, TransactionID: xid,
		ClientIPAddr: net.IPv4zero, YourIPAddr: net.IPv4zero, ServerIPAddr: net.IPv4zero, GatewayIPAddr: net.IPv4zero, Flags: 0x8000,
		Options: dhcpv4.Options{
			53: {byte(kind)}, 55: params, 57: {0x05, 0xc0}, 60: []byte(class),
			93: binary.BigEndian.AppendUint16(nil, c.Arch), 94: {1, 3, 1},
		}}
	if !c.NoUUID {
		id := append([]byte{0}, bytes.Repeat([]byte{0x11}, 10)...)
		p.Options[97] = append(id, c.MAC...)
	}
	return p
}

// Boot runs one boot option: DHCP, selection, fetch.
func (c *Client) Boot() (Result, error) {
	var res Result
	var xid dhcpv4.TransactionID
	rand.Read(xid[:])
	conn, err := c.listen(68)
	if err != nil {
		return res, err
	}
	defer conn.Close()
	begin := time.Now()
	for _, wait := range c.Wait {
		res.Rounds++
		p := c.Packet(dhcpv4.MessageTypeDiscover, xid)
		p.NumSeconds = uint16(time.Since(begin).Seconds())
		if err := sendTo(conn, p.ToBytes(), "255.255.255.255:67"); err != nil {
			return res, err
		}
		offers := c.collect(conn, xid, dhcpv4.MessageTypeOffer, wait, 16)
		dhcp, boot, kind := c.choose(offers)
		if dhcp.DHCPv4 == nil {
			continue
		}
		res.Offered = time.Since(begin)
		if err := c.take(conn, xid, dhcp, &res); err != nil {
			return res, err
		}
		res.Kind, res.File = kind, boot.file()
		if strings.HasSuffix(kind, "binl") {
			if boot, err = c.binl(xid, boot, res.Addr); err != nil {
				return res, err
			}
			res.File = boot.file()
		}
		if c.dry {
			return res, nil
		}
		if c.HTTP {
			res.Data, err = c.httpFetch(res.File)
		} else {
			res.Data, err = c.tftpFetch(boot.bootServer(), res.File)
		}
		return res, err
	}
	return res, ErrNoOffer
}

// Lease does what Boot does before it fetches anything.
func (c *Client) Lease() (Result, error) {
	d := *c
	d.dry = true
	return d.Boot()
}

// choose is PxeBcSelectOffer and HttpBootSelectDhcpOffer: it returns the
// offer to take the address from and the one to take the boot file from.
func (c *Client) choose(offers []offer) (dhcp, boot offer, kind string) {
	first := func(ok func(offer) bool) offer {
		for _, o := range offers {
			if ok(o) {
				return o
			}
		}
		return offer{}
	}
	if c.HTTP {
		web := func(o offer) bool {
			return strings.HasPrefix(o.class(), "HTTPClient") && (strings.HasPrefix(o.file(), "http://") || strings.HasPrefix(o.file(), "https://")) && literal(o.file())
		}
		if o := first(func(o offer) bool { return !o.proxy() && web(o) }); o.DHCPv4 != nil {
			return o, o, "dhcp-http"
		}
		lease := first(func(o offer) bool { return !o.proxy() })
		p := first(func(o offer) bool { return o.proxy() && web(o) })
		if lease.DHCPv4 != nil && p.DHCPv4 != nil && !c.Deaf {
			return lease, p, "proxy-http"
		}
		return offer{}, offer{}, ""
	}
	plain := first(func(o offer) bool { return !o.proxy() && !o.pxe() })
	if plain.DHCPv4 == nil {
		plain = first(func(o offer) bool { return !o.proxy() })
	}
	if o := first(func(o offer) bool { return !o.proxy() && o.pxe() && o.pxe10() && o.file() != "" }); o.DHCPv4 != nil {
		return o, o, "dhcp-pxe10"
	}
	proxied := plain.DHCPv4 != nil && !c.Deaf
	if o := first(func(o offer) bool { return o.proxy() && o.pxe() && o.pxe10() }); o.DHCPv4 != nil && proxied && !c.Old && o.file() != "" {
		return plain, o, "proxy-pxe10"
	}
	if o := first(func(o offer) bool { return !o.proxy() && o.pxe() && !o.pxe10() }); o.DHCPv4 != nil {
		return o, o, "dhcp-binl"
	}
	if o := first(func(o offer) bool { return o.proxy() && o.pxe() && !o.pxe10() }); o.DHCPv4 != nil && proxied {
		return plain, o, "proxy-binl"
	}
	if o := first(func(o offer) bool { return !o.proxy() && o.file() != "" }); o.DHCPv4 != nil {
		return o, o, "dhcp-file"
	}
	return offer{}, offer{}, ""
}

func literal(url string) bool {
	_, host, _ := strings.Cut(url, "://")
	host, _, _ = strings.Cut(host, "/")
	_, err := netip.ParseAddrPort(host)
	if err != nil {
		_, err = netip.ParseAddr(host)
	}
	return err == nil
}

// take requests the lease and puts the address on the interface.
func (c *Client) take(conn *net.UDPConn, xid dhcpv4.TransactionID, o offer, res *Result) error {
	p := c.Packet(dhcpv4.MessageTypeRequest, xid)
	p.Options[50] = o.YourIPAddr.To4()
	p.Options[54] = o.server().AsSlice()
	var acks []offer
	tries, wait := 3, 2*time.Second
	if c.Impatient {
		tries, wait = 1, 500*time.Millisecond
	}
	for range tries { // Dhcp4Dxe repeats the REQUEST, too
		if err := sendTo(conn, p.ToBytes(), "255.255.255.255:67"); err != nil {
			return err
		}
		if acks = c.collect(conn, xid, dhcpv4.MessageTypeAck, wait, 1); len(acks) > 0 {
			break
		}
	}
	if len(acks) == 0 || !acks[0].YourIPAddr.Equal(o.YourIPAddr) {
		return fmt.Errorf("edk2: no ACK for %s", o.YourIPAddr)
	}
	res.Addr, res.Server = netip.AddrFrom4([4]byte(o.YourIPAddr.To4())), o.server()
	eth, err := netlink.LinkByName(c.Iface)
	if err != nil {
		return err
	}
	ones, _ := net.IPMask(acks[0].Options[1]).Size()
	if ones == 0 {
		ones = 24
	}
	err = netlink.AddrAdd(eth, &netlink.Addr{IPNet: &net.IPNet{IP: o.YourIPAddr, Mask: net.CIDRMask(ones, 32)}})
	if errors.Is(err, syscall.EEXIST) {
		err = nil
	}
	return err
}

// binl asks port 4011 for the file.
func (c *Client) binl(xid dhcpv4.TransactionID, o offer, me netip.Addr) (offer, error) {
	conn, err := c.listen(4011)
	if err != nil {
		return offer{}, err
	}
	defer conn.Close()
	for try := range 4 {
		p := c.Packet(dhcpv4.MessageTypeRequest, xid)
		p.ClientIPAddr = me.AsSlice()
		if err := sendTo(conn, p.ToBytes(), netip.AddrPortFrom(o.bootServer(), 4011).String()); err != nil {
			return offer{}, err
		}
		for _, a := range c.collect(conn, xid, dhcpv4.MessageTypeAck, time.Duration(try+1)*time.Second, 1) {
			if a.pxe() && a.file() != "" {
				return a, nil
			}
		}
	}
	return offer{}, errors.New("edk2: no answer on port 4011")
}

// collect gathers replies of one kind until the time is over or there are
// enough.
func (c *Client) collect(conn *net.UDPConn, xid dhcpv4.TransactionID, kind dhcpv4.MessageType, wait time.Duration, enough int) []offer {
	var out []offer
	buf := make([]byte, 2048)
	_ = conn.SetReadDeadline(time.Now().Add(wait))
	for len(out) < enough {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			break
		}
		p, err := dhcpv4.FromBytes(append([]byte(nil), buf[:n]...))
		if err != nil || p.OpCode != dhcpv4.OpcodeBootReply || p.TransactionID != xid || !bytes.Equal(p.ClientHWAddr, c.MAC) || p.MessageType() != kind {
			continue
		}
		// A reply may be no longer than what option 57 said.
		if n+28 > 0x05c0 {
			continue
		}
		out = append(out, offer{p, from})
	}
	return out
}

func (c *Client) listen(port int) (*net.UDPConn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
		unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, c.Iface),
		unix.Bind(fd, &unix.SockaddrInet4{Port: port}))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return fileConn(fd)
}

func sendTo(conn *net.UDPConn, b []byte, to string) error {
	_, err := conn.WriteToUDPAddrPort(b, netip.MustParseAddrPort(to))
	return err
}
