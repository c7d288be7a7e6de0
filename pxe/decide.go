package pxe

import (
	"fmt"
	"net/netip"
	"time"
)

// Verb is what to do with a packet.
type Verb uint8

// The verbs.
const (
	// Silent: send nothing.
	Silent Verb = iota
	// Lease: treat it by the DHCP rules, without a boot part.
	Lease
	// LeaseBoot: the DHCP rules, with the boot part.
	LeaseBoot
	// OfferBoot: send a proxy offer (no address) with the boot part.
	OfferBoot
	// AckBoot: acknowledge a request on port 4011 with the boot part.
	AckBoot
)

var verbNames = [...]string{"silent", "lease", "lease+boot", "offer-boot", "ack-boot"}

// String returns the verb in lower case.
func (v Verb) String() string {
	if int(v) < len(verbNames) {
		return verbNames[v]
	}
	return fmt.Sprintf("verb(%d)", uint8(v))
}

// Boot is the boot part of a DHCP reply.
type Boot struct {
	// VendorClass goes into option 60: the client drops offers without it.
	VendorClass string
	// Server goes into siaddr, and option 54 in proxy mode.
	Server netip.Addr
	// File is a TFTP name (header field and option 67) or an http URL with
	// an IP literal (option 67). Empty on the BINL rung's offer.
	File string
	// VendorOptions goes into option 43, nil for none.
	VendorOptions []byte
	// CPU is the processor the file is for (a Go name).
	CPU string
}

// URL reports whether File is a URL: it must not go into TFTP fields.
func (b Boot) URL() bool { return b.VendorClass == VendorHTTP }

// Cause groups reasons of silence for counters.
type Cause uint8

// The causes.
const (
	CauseNone Cause = iota
	CauseOff
	CauseDenied
	CauseHealthy
	CauseNoWindow
	CauseNoImage
	CauseUnknownArch
	CauseNotForUs
	CauseStopped
	CauseGaveUp
	CauseBadClient
)

var causeNames = [...]string{"none", "off", "denied", "healthy", "no-window", "no-image", "unknown-arch", "not-for-us", "stopped", "gave-up", "bad-client"}

// String returns the cause as a label.
func (c Cause) String() string {
	if int(c) < len(causeNames) {
		return causeNames[c]
	}
	return fmt.Sprintf("cause(%d)", uint8(c))
}

// Reply is the answer to a Request.
type Reply struct {
	Verb Verb
	// Reason is one sentence for the person watching.
	Reason string
	// Cause is set when Verb is Silent.
	Cause Cause
	Boot  Boot
	// Step is the machine's state once the reply is sent; meaningful unless
	// Quiet.
	Step State
	// Quiet: nothing a person wants to see (traffic that is not ours).
	Quiet bool
	// Alarm: an operator must do something; Reason says what.
	Alarm bool
	// Ladder is the new memory for this MAC (proxy mode).
	Ladder Ladder
	// Counts: this reply uses one place of Policy.Window.
	Counts bool
}

// directDiscovery is option 43 {6:8}, PXE 2.1 table 2-1 PXE_DISCOVERY_CONTROL:
// bit 3 set means "download the boot file named in this packet".
var directDiscovery = []byte{6, 1, 8, 255}

// Decide answers one packet. It has no effects: the caller stores
// Reply.Ladder, counts the window down and sends.
func Decide(now time.Time, req Request, pol Policy) Reply {
	hush := func(c Cause, quiet bool, format string, args ...any) Reply {
		return Reply{Cause: c, Step: StateRefused, Quiet: quiet, Ladder: pol.Ladder, Reason: fmt.Sprintf(format, args...)}
	}
	// Denied comes first: no other rule may send a byte to such a machine.
	switch {
	case pol.Mode != ModeFull && pol.Mode != ModeProxy:
		return hush(CauseOff, true, "boot service is off")
	case pol.Standing == Denied:
		return hush(CauseDenied, false, "denied%s: not answered", because(pol.Why))
	case !req.MAC.Usable():
		return hush(CauseBadClient, true, "hardware address %s is not one station's", req.MAC)
	}
	class := req.Class()
	if class == ClassHost {
		if pol.Mode == ModeProxy {
			return hush(CauseNotForUs, true, "not a network boot client")
		}
		return decideHost(req, pol, hush)
	}
	if pol.Mode == ModeFull && pol.Stopped != "" {
		return hush(CauseStopped, false, "leasing is stopped: %s", pol.Stopped)
	}
	switch req.Type {
	case Discover, Ask, Inform:
	case Decline, Release:
		if pol.Mode == ModeFull && req.Port == PortDHCP {
			return Reply{Verb: Lease, Reason: "gives its address back", Step: StateSeen, Ladder: pol.Ladder, Quiet: true}
		}
		return hush(CauseNotForUs, true, "%s is for the leasing server", req.Type)
	default:
		return hush(CauseBadClient, true, "%s is not a client's message", req.Type)
	}
	// The ports of the proxy: DISCOVER on 67, REQUEST on 4011. A REQUEST on
	// 67 is the client talking to the leasing server.
	if pol.Mode == ModeProxy {
		switch {
		case req.Port == PortDHCP && req.Type != Discover:
			return hush(CauseNotForUs, true, "%s is for the leasing server", req.Type)
		case req.Port == PortBINL && req.Type == Discover:
			return hush(CauseNotForUs, true, "DISCOVER does not belong on port 4011")
		}
	}
	// Full mode with a complete offer never sends anybody to port 4011.
	if pol.Mode == ModeFull && req.Port == PortBINL && req.Type == Discover {
		return hush(CauseNotForUs, true, "DISCOVER does not belong on port 4011")
	}

	why, counts := "", false
	switch pol.Standing {
	case Healthy:
		return hush(CauseHealthy, false, "known and healthy%s: left to boot its disk", because(pol.Why))
	case Recover:
		why = "told to recover" + because(pol.Why)
	default:
		switch {
		case pol.Mode == ModeFull:
			why = "unknown machine on the provisioning network"
		case pol.Admitted:
			why = "unknown machine, let in by the open window"
		case pol.Window.Open(now):
			why, counts = "unknown machine, let in by the open window", true
		default:
			return hush(CauseNoWindow, false, "unknown machine and no open window: not answered (open one to let it in)")
		}
	}

	boot, rep, ok := bootPart(req, pol, class, hush)
	if !ok {
		return rep
	}
	rep = Reply{Boot: boot, Counts: counts, Ladder: pol.Ladder, Step: StateOffered}
	switch {
	case req.Port == PortBINL:
		rep.Verb, rep.Step = AckBoot, StateOffered
		rep.Boot.VendorOptions = nil
		rep.Reason = fmt.Sprintf("%s: boot file %s sent on port 4011", why, boot.File)
	case pol.Mode == ModeFull:
		rep.Verb = LeaseBoot
		if req.Type == Ask {
			rep.Step = StateBound
		}
		rep.Reason = fmt.Sprintf("%s: offering %s", why, boot.File)
	default:
		return climb(now, rep, class, why)
	}
	return rep
}

// decideHost is full mode for an operating system, such as the recovery
// image once it runs: an address, no boot part.
func decideHost(req Request, pol Policy, hush func(Cause, bool, string, ...any) Reply) Reply {
	switch {
	case req.Port != PortDHCP:
		return hush(CauseNotForUs, true, "not a network boot client")
	case pol.Stopped != "":
		return hush(CauseStopped, true, "leasing is stopped: %s", pol.Stopped)
	case req.Type == Discover, req.Type == Ask, req.Type == Decline, req.Type == Release, req.Type == Inform:
		return Reply{Verb: Lease, Reason: "address only", Step: StateSeen, Quiet: true, Ladder: pol.Ladder}
	}
	return hush(CauseBadClient, true, "%s is not a client's message", req.Type)
}

// bootPart picks the file. A URL never goes to a TFTP client, nor a TFTP
// name to an HTTP client: the class and the architecture must agree, since
// some DHCP front ends rewrite one of them.
func bootPart(req Request, pol Policy, class Class, hush func(Cause, bool, string, ...any) Reply) (Boot, Reply, bool) {
	arch, known := Choose(req.Archs)
	if !known {
		return Boot{}, hush(CauseUnknownArch, false, "%s: no such platform is known", arch), false
	}
	p, _ := arch.Platform()
	if p.Refusal != "" {
		return Boot{}, hush(CauseNoImage, false, "%s: %s", arch, p.Refusal), false
	}
	if (class == ClassHTTP) != (p.Transport == TransportHTTP) {
		return Boot{}, hush(CauseBadClient, false, "says %s but architecture %s", class, arch), false
	}
	img, ok := pol.Images[p.CPU]
	if !ok || img.Path == "" {
		return Boot{}, hush(CauseNoImage, false, "%s: no recovery image for %s is registered here", arch, p.CPU), false
	}
	if class == ClassHTTP {
		scheme, port := "http", pol.HTTPPort
		if pol.HTTPSPort != 0 && (pol.HTTPSOnly || !pol.Untrusting || port == 0) {
			scheme, port = "https", pol.HTTPSPort
		} else if pol.HTTPSOnly {
			port = 0
		}
		if port == 0 {
			return Boot{}, hush(CauseNoImage, false, "%s: HTTP boot is not served here", arch), false
		}
		// An IP literal needs no DNS: EDK2 ranks it above every name.
		url := fmt.Sprintf("%s://%s/%s", scheme, netip.AddrPortFrom(pol.Server, port), img.Path)
		return Boot{VendorClass: VendorHTTP, Server: pol.Server, File: url, CPU: p.CPU}, Reply{}, true
	}
	return Boot{VendorClass: VendorPXE, Server: pol.Server, File: img.Path, VendorOptions: directDiscovery, CPU: p.CPU}, Reply{}, true
}

// climb applies the quirk ladder to a proxy offer.
func climb(now time.Time, rep Reply, class Class, why string) Reply {
	before := rep.Ladder
	l := before.next(now)
	if l.Rung == RungGaveUp {
		if before.Rung != RungGaveUp {
			l.Offered = now
		}
		boot := rep.Boot
		rep = Reply{Ladder: l, Cause: CauseGaveUp, Step: StateGaveUp, Alarm: before.Rung != RungGaveUp,
			Quiet: before.Rung == RungGaveUp, Reason: "the firmware ignores proxy offers: " + Advice(boot)}
		return rep
	}
	l.Offered = now
	rep.Ladder, rep.Verb = l, OfferBoot
	rep.Reason = fmt.Sprintf("%s: offering %s", why, rep.Boot.File)
	if class == ClassPXE && l.Rung == RungBINL {
		rep.Reason = fmt.Sprintf("%s: offering %s through port 4011, since the direct offer led to no fetch", why, rep.Boot.File)
		rep.Boot.File, rep.Boot.VendorOptions = "", nil
	}
	return rep
}

// Advice is the sentence with the exact options to set in the site's own
// DHCP server, for firmware that ignores proxies and for mode off.
func Advice(b Boot) string {
	tftp, http := "7 or 9", "16 or 17"
	if b.CPU == "arm64" {
		tftp, http = "11", "19"
	}
	if b.URL() {
		return fmt.Sprintf("set in your DHCP server for clients with option 93 = %s: option 60 (vendor class) = %q, option 67 (bootfile-name) = %q",
			http, VendorHTTP, b.File)
	}
	return fmt.Sprintf("set in your DHCP server for clients with option 93 = %s: next-server (siaddr) and option 66 = %s, option 67 (bootfile-name) = %q, and no option 43",
		tftp, b.Server, b.File)
}

func because(why string) string {
	if why == "" {
		return ""
	}
	return " (" + why + ")"
}
