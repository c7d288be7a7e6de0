package pxe

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
)

// MAC is an Ethernet address.
type MAC [6]byte

// String returns lower-case colon form.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// MarshalText implements encoding.TextMarshaler.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(b []byte) error {
	p, err := ParseMAC(string(b))
	if err == nil {
		*m = p
	}
	return err
}

// ParseMAC reads six hex bytes with ':' or '-' between them.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	if len(s) == 17 {
		if b, err := hex.DecodeString(strings.NewReplacer(":", "", "-", "").Replace(s)); err == nil && len(b) == 6 {
			copy(m[:], b)
			return m, nil
		}
	}
	return m, fmt.Errorf("pxe: read MAC: want six hex bytes like 52:54:00:12:34:56, got %q", clip(s, 40))
}

// Usable reports whether m can be one station's address: not all zero and no
// group address.
func (m MAC) Usable() bool { return m != MAC{} && m[0]&1 == 0 }

// UUID is the client machine identifier (option 97, RFC 4578 section 2.3) as
// sent, without the leading type byte. The zero value means absent: some PXE
// ROMs omit it.
type UUID [16]byte

// String prints the UUID as SMBIOS tools do: the first three fields are
// little-endian on the wire (SMBIOS 7.2.1). Empty if absent.
func (u UUID) String() string {
	if u == (UUID{}) {
		return ""
	}
	return fmt.Sprintf("%02x%02x%02x%02x-%02x%02x-%02x%02x-%x-%x",
		u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6], u[8:10], u[10:])
}

// MessageType is a DHCP message type (option 53, RFC 2132 section 9.6).
type MessageType uint8

// The DHCP message types.
const (
	Discover MessageType = 1
	Offer    MessageType = 2
	// Ask is DHCPREQUEST; the plain word is the type below.
	Ask     MessageType = 3
	Decline MessageType = 4
	Ack     MessageType = 5
	Nak     MessageType = 6
	Release MessageType = 7
	Inform  MessageType = 8
)

// String returns the name in RFC 2131 without its DHCP prefix.
func (t MessageType) String() string {
	if int(t) < len(messageNames) && messageNames[t] != "" {
		return messageNames[t]
	}
	return fmt.Sprintf("message type %d", uint8(t))
}

var messageNames = [...]string{1: "DISCOVER", 2: "OFFER", 3: "REQUEST", 4: "DECLINE", 5: "ACK", 6: "NAK", 7: "RELEASE", 8: "INFORM"}

// Port is the UDP port a packet came to.
type Port uint16

// The two ports of network boot.
const (
	PortDHCP Port = 67
	PortBINL Port = 4011
)

// Request is the facts of one DHCP packet from a client. Every field is a
// claim; lengths are capped by the parser (package dhcp).
type Request struct {
	Port Port
	Type MessageType
	XID  uint32
	// Secs is the client's "seconds since I began" field.
	Secs uint16
	MAC  MAC
	UUID UUID
	// Archs is option 93, at most 8 values.
	Archs []Arch
	// VendorClass is option 60 and UserClass option 77, at most 255 bytes
	// each, with unprintable bytes replaced by '?'.
	VendorClass string
	UserClass   string
	// NetworkInterface is true when option 94 is present.
	NetworkInterface bool
	// Client (ciaddr), Gateway (giaddr), RequestedIP (50) and ServerID (54)
	// are invalid when absent or 0.0.0.0.
	Client      netip.Addr
	Gateway     netip.Addr
	RequestedIP netip.Addr
	ServerID    netip.Addr
	// MaxSize is option 57 (0 if absent), Params option 55.
	MaxSize uint16
	Params  []uint8
	// ClientID (61), RelayInfo (82) and MachineID (97) are echoed verbatim.
	ClientID  []byte
	RelayInfo []byte
	MachineID []byte
}

// Class is what kind of client sent a Request.
type Class uint8

// The kinds of clients.
const (
	// ClassHost is an operating system that wants an address only.
	ClassHost Class = iota
	// ClassPXE is firmware that fetches by TFTP.
	ClassPXE
	// ClassHTTP is UEFI HTTP boot firmware.
	ClassHTTP
)

// String returns "host", "pxe" or "http".
func (c Class) String() string {
	switch c {
	case ClassPXE:
		return "pxe"
	case ClassHTTP:
		return "http"
	}
	return "host"
}

// The vendor class identifiers of firmware (option 60): PXE 2.1 section 2.2,
// UEFI 2.10 section 24.7.
const (
	VendorPXE  = "PXEClient"
	VendorHTTP = "HTTPClient"
)

// Class tells firmware from operating systems. Firmware is taken at its word
// only with option 93 present: other things carry "PXEClient" too.
func (r Request) Class() Class {
	if len(r.Archs) == 0 {
		return ClassHost
	}
	switch {
	case strings.HasPrefix(r.VendorClass, VendorPXE):
		return ClassPXE
	case strings.HasPrefix(r.VendorClass, VendorHTTP):
		return ClassHTTP
	}
	return ClassHost
}

// Machine is what a policy is looked up by. All of it can be forged.
type Machine struct {
	MAC  MAC  `json:"mac"`
	UUID UUID `json:"uuid"`
	Arch Arch `json:"arch"`
	// Class is host for an operating system that wants an address only.
	Class Class `json:"class"`
}

// Machine returns the machine that sent r.
func (r Request) Machine() Machine {
	a, _ := Choose(r.Archs)
	return Machine{MAC: r.MAC, UUID: r.UUID, Arch: a, Class: r.Class()}
}

// clip bounds hostile input in error texts.
func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
