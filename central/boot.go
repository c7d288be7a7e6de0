package central

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pxe"
	pxeserver "github.com/muster-edge/muster/pxe/server"
)

// BootConfig switches on the role that answers machines which boot from the
// network.
type BootConfig struct {
	// Interface to serve on.
	Interface string
	// Mode is pxe.ModeFull, ModeProxy or ModeOff.
	Mode pxe.Mode
	// Address is ours on the interface, with the network's length; empty:
	// the interface's first.
	Address netip.Prefix
	// Range is leased in full mode.
	Range pxeserver.Range
	// HTTP is the address of HTTP boot, ":7480" by default.
	HTTP string
	// HTTPS is the address of HTTP boot with TLS, "" for none; HTTPSOnly
	// never gives a machine a plain URL.
	HTTPS     string
	HTTPSOnly bool
	// Image is the directory of a built recovery image.
	Image string
}

func (c *BootConfig) validate() error {
	var errs []error
	if c.Interface == "" {
		errs = append(errs, errors.New("central: config: the boot role needs an interface"))
	}
	if c.Image == "" {
		errs = append(errs, errors.New("central: config: the boot role needs the directory of an image: build one with muster image recovery"))
	} else if _, err := os.Stat(filepath.Join(c.Image, pxeserver.ImageName)); err != nil {
		errs = append(errs, fmt.Errorf("central: config: image directory: %w", err))
	}
	if c.Mode == pxe.ModeFull && !c.Range.From.IsValid() {
		errs = append(errs, errors.New("central: config: the boot mode full needs a range of addresses to lease"))
	}
	return errors.Join(errs...)
}

// bootRole is the boot server while it runs.
type bootRole struct {
	mu     sync.Mutex
	server *pxeserver.Server
}

func (b *bootRole) get() *pxeserver.Server {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.server
}

// runBoot serves machines that boot, if that was asked for.
func (s *Server) runBoot(ctx context.Context) error {
	c := s.cfg.Boot
	if c == nil {
		<-ctx.Done()
		return nil
	}
	server, err := pxeserver.New(pxeserver.Config{
		Interface: c.Interface, Mode: c.Mode, Address: c.Address.Addr(), Range: c.Range, HTTPAddr: c.HTTP,
		HTTPSAddr: c.HTTPS, HTTPSOnly: c.HTTPSOnly,
		StateDir: s.data.file("boot"), Images: pxeserver.Dir(c.Image),
		Policy: pxeserver.PolicyFunc(s.standing), Events: bootEvents{s}, Log: s.log, Now: s.cfg.Now,
	})
	if err != nil {
		return err
	}
	s.boot.mu.Lock()
	s.boot.server = server
	s.boot.mu.Unlock()
	err = server.Run(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// standing says who may boot: denied machines get silence, and so do those that
// have a system on their disk (bootstanding.go). The recovery image is signed,
// public and of no use to somebody who is not approved.
func (s *Server) standing(ctx context.Context, m pxe.Machine) pxeserver.Decision {
	if s.index.deniedMAC(m.MAC.String()) {
		return pxeserver.Decision{Standing: pxe.Denied, Reason: "the machine is denied"}
	}
	return s.standingOf(ctx, m.MAC.String())
}

// bootEvents puts the steps of booting machines into the event log.
type bootEvents struct{ s *Server }

// Event implements pxeserver.EventSink.
func (b bootEvents) Event(e pxe.Event) {
	kind := "pxe." + eventWord(e.Step.String())
	level := fleet.EventInfo
	if e.Alarm {
		kind, level = "pxe.alarm", fleet.EventAlarm
	}
	b.s.metrics.boots.WithLabelValues(kind).Inc()
	out := fleet.Event{Tenant: DefaultTenant, Time: e.Time, Level: level, Kind: kind, Text: e.Text}
	if e.MAC != (pxe.MAC{}) {
		out.MAC = e.MAC.String()
		out.Fields = map[string]string{"arch": e.Arch.String()}
	}
	if e.Addr.IsValid() {
		if out.Fields == nil {
			out.Fields = make(map[string]string)
		}
		out.Fields["address"] = e.Addr.String()
	}
	b.s.journal.add(out)
}

func eventWord(step string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(step)), "-")
}

// calledHome tells the boot role that a machine which booted reached us.
func (s *Server) calledHome(r fleet.Request) {
	server := s.boot.get()
	if server == nil {
		return
	}
	for i, nic := range r.Evidence.Hardware.NICs {
		if mac, err := pxe.ParseMAC(nic.MAC); err == nil && i < 32 {
			server.CalledHome(mac)
		}
	}
}

// bootWindow lets unknown machines boot beside another DHCP server.
type bootWindow struct {
	Until time.Time `json:"until"`
	Count uint32    `json:"count"`
}

const (
	maxBootWindow  = 7 * 24 * time.Hour
	maxBootMachine = 1000
)
