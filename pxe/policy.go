package pxe

import (
	"fmt"
	"net/netip"
	"time"
)

// Mode is how the boot host takes part in DHCP.
type Mode uint8

// The modes.
const (
	// ModeOff sends nothing at all.
	ModeOff Mode = iota
	// ModeFull leases addresses on a provisioning network.
	ModeFull
	// ModeProxy answers beside the site's own DHCP server.
	ModeProxy
)

var modeNames = [...]string{"off", "full", "proxy"}

// String returns "off", "full" or "proxy".
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// ParseMode reads "off", "full" or "proxy".
func ParseMode(s string) (Mode, error) {
	for i, n := range modeNames {
		if n == s {
			return Mode(i), nil
		}
	}
	return 0, fmt.Errorf("pxe: read boot mode: want off, full or proxy, got %q", clip(s, 40))
}

// Standing is what the operator's side knows of a machine.
type Standing uint8

// The standings.
const (
	// Unknown machines were never enrolled.
	Unknown Standing = iota
	// Recover: an operator wants it to boot the recovery image once. Who
	// keeps the standing ends it when the machine calls home, not when the
	// file was sent: firmware probes and aborts.
	Recover
	// Healthy machines are known and boot from their disk: silence.
	Healthy
	// Denied machines get not one byte.
	Denied
)

var standingNames = [...]string{"unknown", "recover", "healthy", "denied"}

// String returns "unknown", "recover", "healthy" or "denied".
func (s Standing) String() string {
	if int(s) < len(standingNames) {
		return standingNames[s]
	}
	return fmt.Sprintf("standing(%d)", uint8(s))
}

// Window is the operator's permission to boot unknown machines in proxy
// mode, for a time and for a number of machines.
type Window struct {
	Until time.Time `json:"until"`
	// Left counts machines that may still come in.
	Left int `json:"left"`
}

// Open reports whether one more machine may come in at now.
func (w Window) Open(now time.Time) bool { return w.Left > 0 && now.Before(w.Until) }

// Image is a recovery image that can be served.
type Image struct {
	// Path is the file's name under TFTP and, with a leading slash, under
	// HTTP: for example "amd64/recovery.efi".
	Path string
	// Size in bytes, for events.
	Size int64
}

// Policy is all that Decide knows besides the packet.
type Policy struct {
	Mode     Mode
	Standing Standing
	// Why is the reason given with Standing, for the person watching.
	Why string
	// Stopped says why full mode has stopped leasing ("" if it has not).
	Stopped string
	// Window lets unknown machines in (proxy mode); Admitted is true for a
	// machine that has been counted in this window already.
	Window   Window
	Admitted bool
	// Ladder is what was tried with this MAC (proxy mode).
	Ladder Ladder
	// Server is our address on the network the packet came from.
	Server netip.Addr
	// HTTPPort is where httpboot listens; 0 if HTTP boot is not served.
	HTTPPort uint16
	// HTTPSPort is where httpboot listens with TLS; 0 if it does not.
	HTTPSPort uint16
	// HTTPSOnly never falls back to plain HTTP. Untrusting is true when this
	// machine was just given an https URL and did not fetch it: its firmware may
	// lack our CA, or believe a clock that is wrong.
	HTTPSOnly, Untrusting bool
	// Images by CPU (Go names).
	Images map[string]Image
}
