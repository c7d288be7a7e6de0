package pxe_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/pxe"
)

var (
	t0   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	mac  = pxe.MAC{0x52, 0x54, 0, 1, 2, 3}
	self = netip.MustParseAddr("10.77.0.1")
)

// client is a DISCOVER of firmware of the given architecture.
func client(arch pxe.Arch) pxe.Request {
	class := pxe.VendorPXE
	if p, ok := arch.Platform(); ok && p.Transport == pxe.TransportHTTP {
		class = pxe.VendorHTTP
	}
	return pxe.Request{Port: pxe.PortDHCP, Type: pxe.Discover, MAC: mac, Archs: []pxe.Arch{arch},
		VendorClass: fmt.Sprintf("%s:Arch:%05d:UNDI:003001", class, arch)}
}

func policy(mode pxe.Mode) pxe.Policy {
	return pxe.Policy{Mode: mode, Server: self, HTTPPort: 7480, Images: map[string]pxe.Image{"amd64": {Path: "amd64/recovery.efi", Size: 1}}}
}

func TestArchMatrix(t *testing.T) {
	const tftp, url = "amd64/recovery.efi", "http://10.77.0.1:7480/amd64/recovery.efi"
	for _, c := range []struct {
		arch pxe.Arch
		file string
		why  string // part of the reason when there is no file
	}{
		{0, "", "BIOS"},
		{6, "", "32-bit UEFI"},
		{7, tftp, ""},
		{9, tftp, ""},
		{10, "", "32-bit ARM"},
		{11, "", "no recovery image for arm64"},
		{15, "", "32-bit UEFI"},
		{16, url, ""},
		{17, url, ""},
		{18, "", "32-bit ARM"},
		{19, "", "no recovery image for arm64"},
		{20, "", "BIOS"},
		{27, "", "RISC-V"},
		{28, "", "RISC-V"},
		{12, "", "no such platform"},
		{65535, "", "no such platform"},
	} {
		rep := pxe.Decide(t0, client(c.arch), policy(pxe.ModeFull))
		if rep.Boot.File != c.file {
			t.Errorf("arch %s gets %q, want %q (%s)", c.arch, rep.Boot.File, c.file, rep.Reason)
		}
		if c.file == "" && (rep.Verb != pxe.Silent || !strings.Contains(rep.Reason, c.why) || rep.Quiet) {
			t.Errorf("arch %s: want silence and a reason with %q, got %s, %q", c.arch, c.why, rep.Verb, rep.Reason)
		}
		if c.file != "" && rep.Verb != pxe.LeaseBoot {
			t.Errorf("arch %s: verb %s", c.arch, rep.Verb)
		}
	}
}

func TestArm64IsServedOnceThereIsAnImage(t *testing.T) {
	pol := policy(pxe.ModeFull)
	pol.Images["arm64"] = pxe.Image{Path: "arm64/recovery.efi"}
	if rep := pxe.Decide(t0, client(pxe.ArchEFIARM64), pol); rep.Boot.File != "arm64/recovery.efi" {
		t.Errorf("arm64 gets %q", rep.Boot.File)
	}
	if rep := pxe.Decide(t0, client(pxe.ArchHTTPARM64), pol); rep.Boot.File != "http://10.77.0.1:7480/arm64/recovery.efi" {
		t.Errorf("arm64 HTTP gets %q", rep.Boot.File)
	}
}

func TestDecide(t *testing.T) {
	with := func(mode pxe.Mode, f func(*pxe.Policy)) pxe.Policy {
		p := policy(mode)
		f(&p)
		return p
	}
	req := func(f func(*pxe.Request)) pxe.Request {
		r := client(pxe.ArchEFIX64)
		f(&r)
		return r
	}
	same := func(*pxe.Policy) {}
	host := func(typ pxe.MessageType) pxe.Request {
		return pxe.Request{Port: pxe.PortDHCP, Type: typ, MAC: mac, VendorClass: "linux"}
	}
	open := pxe.Window{Until: t0.Add(time.Minute), Left: 1}
	for _, c := range []struct {
		name  string
		req   pxe.Request
		pol   pxe.Policy
		verb  pxe.Verb
		cause pxe.Cause
	}{
		{"off says nothing", client(7), with(pxe.ModeOff, same), pxe.Silent, pxe.CauseOff},
		{"full: unknown firmware is served", client(7), with(pxe.ModeFull, same), pxe.LeaseBoot, 0},
		{"full: its REQUEST too", req(func(r *pxe.Request) { r.Type = pxe.Ask }), with(pxe.ModeFull, same), pxe.LeaseBoot, 0},
		{"full: healthy firmware is left alone", client(7), with(pxe.ModeFull, func(p *pxe.Policy) { p.Standing = pxe.Healthy }), pxe.Silent, pxe.CauseHealthy},
		{"full: a healthy machine's system gets an address", host(pxe.Discover), with(pxe.ModeFull, func(p *pxe.Policy) { p.Standing = pxe.Healthy }), pxe.Lease, 0},
		{"full: told to recover is served", client(7), with(pxe.ModeFull, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.LeaseBoot, 0},
		{"full: denied firmware gets nothing", client(7), with(pxe.ModeFull, func(p *pxe.Policy) { p.Standing = pxe.Denied }), pxe.Silent, pxe.CauseDenied},
		{"full: denied system gets nothing", host(pxe.Discover), with(pxe.ModeFull, func(p *pxe.Policy) { p.Standing = pxe.Denied }), pxe.Silent, pxe.CauseDenied},
		{"full: stopped leases nothing to firmware", client(7), with(pxe.ModeFull, func(p *pxe.Policy) { p.Stopped = "x" }), pxe.Silent, pxe.CauseStopped},
		{"full: stopped leases nothing to systems", host(pxe.Ask), with(pxe.ModeFull, func(p *pxe.Policy) { p.Stopped = "x" }), pxe.Silent, pxe.CauseStopped},
		{"full: system renews", host(pxe.Ask), with(pxe.ModeFull, same), pxe.Lease, 0},
		{"full: an OFFER is no request", host(pxe.Offer), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: firmware's OFFER neither", req(func(r *pxe.Request) { r.Type = pxe.Offer }), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: DECLINE reaches the leases", req(func(r *pxe.Request) { r.Type = pxe.Decline }), with(pxe.ModeFull, same), pxe.Lease, 0},
		{"full: group MAC", req(func(r *pxe.Request) { r.MAC[0] = 1 }), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: zero MAC", req(func(r *pxe.Request) { r.MAC = pxe.MAC{} }), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: class without option 93 is a host", req(func(r *pxe.Request) { r.Archs = nil }), with(pxe.ModeFull, same), pxe.Lease, 0},
		{"full: class and arch disagree (HTTP arch, PXE class)", req(func(r *pxe.Request) { r.Archs = []pxe.Arch{16} }), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: class and arch disagree (PXE arch, HTTP class)", req(func(r *pxe.Request) { r.VendorClass = "HTTPClient" }), with(pxe.ModeFull, same), pxe.Silent, pxe.CauseBadClient},
		{"full: HTTP is off", client(16), with(pxe.ModeFull, func(p *pxe.Policy) { p.HTTPPort = 0 }), pxe.Silent, pxe.CauseNoImage},
		{"full: no image at all", client(7), with(pxe.ModeFull, func(p *pxe.Policy) { p.Images = nil }), pxe.Silent, pxe.CauseNoImage},
		{"full: first known of several archs", req(func(r *pxe.Request) { r.Archs = []pxe.Arch{99, 7} }), with(pxe.ModeFull, same), pxe.LeaseBoot, 0},
		{"proxy: unknown without a window", client(7), with(pxe.ModeProxy, same), pxe.Silent, pxe.CauseNoWindow},
		{"proxy: unknown in a window", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = open }), pxe.OfferBoot, 0},
		{"proxy: window used up", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = pxe.Window{Until: open.Until} }), pxe.Silent, pxe.CauseNoWindow},
		{"proxy: window used up, but this one was let in", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = pxe.Window{Until: open.Until}; p.Admitted = true }), pxe.OfferBoot, 0},
		{"proxy: window is over", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = pxe.Window{Until: t0, Left: 5} }), pxe.Silent, pxe.CauseNoWindow},
		{"proxy: told to recover needs no window", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.OfferBoot, 0},
		{"proxy: healthy in an open window", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = open; p.Standing = pxe.Healthy }), pxe.Silent, pxe.CauseHealthy},
		{"proxy: denied in an open window", client(7), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Window = open; p.Standing = pxe.Denied }), pxe.Silent, pxe.CauseDenied},
		{"proxy: systems are not ours", host(pxe.Discover), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.Silent, pxe.CauseNotForUs},
		{"proxy: REQUEST on 67 is not ours", req(func(r *pxe.Request) { r.Type = pxe.Ask }), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.Silent, pxe.CauseNotForUs},
		{"proxy: DECLINE is not ours", req(func(r *pxe.Request) { r.Type = pxe.Decline }), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.Silent, pxe.CauseNotForUs},
		{"proxy: REQUEST on 4011", req(func(r *pxe.Request) { r.Type, r.Port = pxe.Ask, pxe.PortBINL }), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.AckBoot, 0},
		{"proxy: DISCOVER on 4011", req(func(r *pxe.Request) { r.Port = pxe.PortBINL }), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Recover }), pxe.Silent, pxe.CauseNotForUs},
		{"proxy: denied on 4011", req(func(r *pxe.Request) { r.Type, r.Port = pxe.Ask, pxe.PortBINL }), with(pxe.ModeProxy, func(p *pxe.Policy) { p.Standing = pxe.Denied }), pxe.Silent, pxe.CauseDenied},
		{"proxy: unknown on 4011 without a window", req(func(r *pxe.Request) { r.Type, r.Port = pxe.Ask, pxe.PortBINL }), with(pxe.ModeProxy, same), pxe.Silent, pxe.CauseNoWindow},
	} {
		t.Run(c.name, func(t *testing.T) {
			rep := pxe.Decide(t0, c.req, c.pol)
			if rep.Verb != c.verb || rep.Cause != c.cause {
				t.Errorf("got %s, %s (%s), want %s, %s", rep.Verb, rep.Cause, rep.Reason, c.verb, c.cause)
			}
			if rep.Reason == "" {
				t.Error("no reason given")
			}
		})
	}
}

func TestWindowIsCountedOncePerMachine(t *testing.T) {
	pol := policy(pxe.ModeProxy)
	pol.Window = pxe.Window{Until: t0.Add(time.Hour), Left: 1}
	if rep := pxe.Decide(t0, client(7), pol); !rep.Counts {
		t.Error("the first reply does not count")
	}
	pol.Admitted = true
	if rep := pxe.Decide(t0, client(7), pol); rep.Counts || rep.Verb != pxe.OfferBoot {
		t.Errorf("the second reply counts=%v, verb %s", rep.Counts, rep.Verb)
	}
	pol.Standing, pol.Admitted = pxe.Recover, false
	if rep := pxe.Decide(t0, client(7), pol); rep.Counts {
		t.Error("a machine told to recover uses up the window")
	}
}

func TestLadder(t *testing.T) {
	type step struct {
		after time.Duration // since the step before
		fetch bool          // a fetch instead of a DISCOVER
		want  string
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"direct works", []step{{0, false, "direct"}, {time.Second, true, ""}, {5 * time.Minute, false, "direct"}}},
		{"duplicates do not climb", []step{{0, false, "direct"}, {time.Second, false, "direct"}, {time.Second, false, "direct"}, {4 * time.Second, false, "binl"}}},
		{"old firmware needs 4011, and it is remembered", []step{{0, false, "direct"}, {4 * time.Second, false, "binl"}, {time.Second, true, ""}, {time.Hour, false, "binl"}}},
		{"a fetch between two boots does not climb", []step{{0, false, "direct"}, {time.Second, true, ""}, {4 * time.Second, false, "direct"}}},
		{"deaf firmware gives up, rests, starts again", []step{{0, false, "direct"}, {4 * time.Second, false, "binl"}, {8 * time.Second, false, "gave-up"}, {16 * time.Second, false, "gave-up"}, {time.Minute, false, "direct"}}},
		{"a new boot starts below", []step{{0, false, "direct"}, {2 * time.Minute, false, "direct"}}},
		{"what worked once and fails now goes round", []step{{0, false, "direct"}, {4 * time.Second, false, "binl"}, {time.Second, true, ""}, {time.Hour, false, "binl"}, {4 * time.Second, false, "direct"}, {8 * time.Second, false, "binl"}, {16 * time.Second, false, "gave-up"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			pol := policy(pxe.ModeProxy)
			pol.Standing = pxe.Recover
			now, alarms := t0, 0
			for i, s := range c.steps {
				now = now.Add(s.after)
				if s.fetch {
					pol.Ladder = pol.Ladder.Fetched()
					continue
				}
				rep := pxe.Decide(now, client(7), pol)
				pol.Ladder = rep.Ladder
				got := rep.Ladder.Rung.String()
				if got != s.want {
					t.Fatalf("step %d: rung %s, want %s", i, got, s.want)
				}
				direct := rep.Verb == pxe.OfferBoot && rep.Boot.VendorOptions != nil && rep.Boot.File != ""
				binl := rep.Verb == pxe.OfferBoot && rep.Boot.VendorOptions == nil && rep.Boot.File == ""
				if direct != (got == "direct") || binl != (got == "binl") {
					t.Errorf("step %d: rung %s sends %+v", i, got, rep.Boot)
				}
				if rep.Alarm {
					alarms++
					for _, want := range []string{"10.77.0.1", "amd64/recovery.efi", "option 67", "siaddr"} {
						if !strings.Contains(rep.Reason, want) {
							t.Errorf("advice lacks %q: %s", want, rep.Reason)
						}
					}
				}
			}
			if gave := strings.Contains(c.name, "deaf") || strings.Contains(c.name, "round"); gave != (alarms == 1) {
				t.Errorf("%d alarms", alarms)
			}
		})
	}
}

func TestHTTPClientsKeepTheirURLOnEveryRung(t *testing.T) {
	pol := policy(pxe.ModeProxy)
	pol.Standing = pxe.Recover
	now := t0
	for i := range 2 {
		rep := pxe.Decide(now, client(16), pol)
		pol.Ladder = rep.Ladder
		if rep.Verb != pxe.OfferBoot || rep.Boot.File != "http://10.77.0.1:7480/amd64/recovery.efi" || rep.Boot.VendorClass != "HTTPClient" {
			t.Errorf("round %d: %s %+v", i, rep.Verb, rep.Boot)
		}
		now = now.Add(4 * time.Second)
	}
	if rep := pxe.Decide(now, client(16), pol); rep.Verb != pxe.Silent || !strings.Contains(rep.Reason, "HTTPClient") {
		t.Errorf("third round: %s, %s", rep.Verb, rep.Reason)
	}
}

func TestStateMoves(t *testing.T) {
	for s := pxe.StateSeen; s <= pxe.StateGaveUp; s++ {
		if s != pxe.StateSeen {
			if _, err := s.MoveTo(pxe.StateSeen); err != nil {
				t.Errorf("a power cycle must always be possible: %v", err)
			}
		}
		b, _ := s.MarshalText()
		var back pxe.State
		if err := back.UnmarshalText(b); err != nil || back != s {
			t.Errorf("%s does not read back: %v", s, err)
		}
	}
	if _, err := pxe.StateSeen.MoveTo(pxe.StateServed); err == nil {
		t.Error("seen -> served is not a step")
	}
	if s, err := pxe.StateRefused.MoveTo(pxe.StateServed); err == nil || s != pxe.StateRefused {
		t.Error("refused -> served is not a step, and the state must stay")
	}
}

func TestNames(t *testing.T) {
	if got := (pxe.UUID{0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 1, 2, 3, 4, 5, 6, 7, 8}).String(); got != "44332211-6655-8877-0102-030405060708" {
		t.Errorf("UUID prints %s", got)
	}
	for _, s := range []string{"52:54:00:01:02:03", "52-54-00-01-02-03", "52:54:00:01:02:0A"} {
		if m, err := pxe.ParseMAC(s); err != nil || !strings.EqualFold(m.String(), strings.ReplaceAll(s, "-", ":")) {
			t.Errorf("%s reads as %s, %v", s, m, err)
		}
	}
	for _, s := range []string{"", "52:54:00:01:02", "52:54:00:01:02:zz", "525400010203", "52:54:00:01:02:03:04", "5:2:5:4:0:0:0:1:02"} {
		if _, err := pxe.ParseMAC(s); err == nil {
			t.Errorf("%q reads as a MAC", s)
		}
	}
	if m, err := pxe.ParseMode("proxy"); err != nil || m != pxe.ModeProxy {
		t.Error("mode proxy does not read")
	}
	if _, err := pxe.ParseMode("both"); err == nil {
		t.Error("mode both reads")
	}
}

// Whatever the packet and the policy: the rules that must never break.
func TestDecideProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		req := pxe.Request{
			Port:        rapid.SampledFrom([]pxe.Port{67, 4011}).Draw(t, "port"),
			Type:        pxe.MessageType(rapid.IntRange(0, 10).Draw(t, "type")),
			MAC:         mac,
			VendorClass: rapid.SampledFrom([]string{"", "PXEClient", "PXEClient:Arch:00007", "HTTPClient:Arch:00016", "HTTPClient", "x"}).Draw(t, "class"),
		}
		for range rapid.IntRange(0, 3).Draw(t, "archs") {
			req.Archs = append(req.Archs, pxe.Arch(rapid.IntRange(0, 40).Draw(t, "arch")))
		}
		pol := policy(pxe.Mode(rapid.IntRange(0, 3).Draw(t, "mode")))
		pol.Standing = pxe.Standing(rapid.IntRange(0, 3).Draw(t, "standing"))
		pol.Admitted = rapid.Bool().Draw(t, "admitted")
		pol.Window = pxe.Window{Until: t0.Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "until"))), Left: rapid.IntRange(-1, 2).Draw(t, "left")}
		pol.Stopped = rapid.SampledFrom([]string{"", "foreign"}).Draw(t, "stopped")
		pol.Ladder.Rung = pxe.Rung(rapid.IntRange(0, 2).Draw(t, "rung"))
		if rapid.Bool().Draw(t, "offered") {
			pol.Ladder.Offered = t0.Add(-time.Duration(rapid.IntRange(0, 200).Draw(t, "ago")) * time.Second)
		}
		rep := pxe.Decide(t0, req, pol)
		if rep.Reason == "" {
			t.Fatal("no reason")
		}
		if (rep.Verb == pxe.Silent) != (rep.Cause != pxe.CauseNone) {
			t.Fatalf("verb %s with cause %s", rep.Verb, rep.Cause)
		}
		boots := rep.Verb == pxe.LeaseBoot || rep.Verb == pxe.OfferBoot || rep.Verb == pxe.AckBoot
		leases := rep.Verb == pxe.Lease || rep.Verb == pxe.LeaseBoot
		switch {
		case pol.Standing == pxe.Denied && rep.Verb != pxe.Silent:
			t.Fatal("a denied machine is answered")
		case pol.Standing == pxe.Healthy && boots:
			t.Fatal("a healthy machine is booted")
		case pol.Mode != pxe.ModeFull && leases:
			t.Fatal("a lease outside full mode")
		case pol.Stopped != "" && leases && (req.Type == pxe.Discover || req.Type == pxe.Ask):
			if req.Class() == pxe.ClassHost || pol.Mode == pxe.ModeFull {
				t.Fatal("a lease while stopped")
			}
		case pol.Mode == pxe.ModeProxy && boots && pol.Standing == pxe.Unknown && !pol.Admitted && !pol.Window.Open(t0):
			t.Fatal("an unknown machine is let in without a window")
		case pol.Mode == pxe.ModeProxy && rep.Verb == pxe.OfferBoot && (req.Port != 67 || req.Type != pxe.Discover):
			t.Fatal("a proxy offer to what is no DISCOVER on port 67")
		case rep.Counts && !pol.Window.Open(t0):
			t.Fatal("a closed window is counted down")
		}
		if boots {
			a, _ := pxe.Choose(req.Archs)
			p, _ := a.Platform()
			url := strings.HasPrefix(rep.Boot.File, "http://")
			if url != (p.Transport == pxe.TransportHTTP) && rep.Boot.File != "" {
				t.Fatalf("arch %s gets %q", a, rep.Boot.File)
			}
			if url && rep.Boot.VendorClass != "HTTPClient" || !url && rep.Boot.VendorClass != "PXEClient" {
				t.Fatalf("%q with class %s", rep.Boot.File, rep.Boot.VendorClass)
			}
		}
	})
}

func BenchmarkDecide(b *testing.B) {
	req, pol := client(7), policy(pxe.ModeFull)
	b.ReportAllocs()
	for b.Loop() {
		if pxe.Decide(t0, req, pol).Verb != pxe.LeaseBoot {
			b.Fatal("not served")
		}
	}
}
