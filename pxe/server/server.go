// Package server composes network boot: DHCP or proxyDHCP, TFTP and HTTP
// boot on one interface, over three small interfaces that say which images
// there are (ImageSource), who may have them (PolicySource) and who wants to
// watch (EventSink). The decisions are package pxe's.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/dhcp"
	"github.com/muster-edge/muster/pxe/httpboot"
	"github.com/muster-edge/muster/pxe/tftp"
)

// File is an image being read; *os.File is one, and the fastest.
type File interface {
	io.ReadSeekCloser
	Stat() (fs.FileInfo, error)
}

// ImageName is the one file that firmware is told to fetch.
const ImageName = "recovery.efi"

// ImageSource says which images there are.
type ImageSource interface {
	// Open opens the named file of the image for a CPU (a Go name, such as
	// amd64). It returns an error that is fs.ErrNotExist for what it does not
	// have; it must not open anything outside its images.
	Open(cpu, name string) (File, error)
}

// Decision is what the operator's side says of a machine.
type Decision struct {
	Standing pxe.Standing
	// Known machines are the operator's own: addresses are kept for them,
	// and they are served first when many strangers ask. Recover and Healthy
	// say so too.
	Known bool
	// Reason is shown to the person watching; a few words.
	Reason string
}

// PolicySource says who may boot. It is asked for every packet of every
// client, so it must answer from memory; it must not fail open.
type PolicySource interface {
	For(ctx context.Context, m pxe.Machine) Decision
}

// PolicyFunc is a function as a PolicySource.
type PolicyFunc func(context.Context, pxe.Machine) Decision

// For implements PolicySource.
func (f PolicyFunc) For(ctx context.Context, m pxe.Machine) Decision { return f(ctx, m) }

// EventSink is told each step of each machine. It must not block.
type EventSink interface {
	Event(pxe.Event)
}

// Range is a range of addresses to lease, ends included.
type Range struct {
	From, To netip.Addr
}

// ParseRange reads "10.77.0.100-10.77.0.199".
func ParseRange(s string) (Range, error) {
	a, b, ok := strings.Cut(s, "-")
	from, err1 := netip.ParseAddr(strings.TrimSpace(a))
	to, err2 := netip.ParseAddr(strings.TrimSpace(b))
	if err := errors.Join(err1, err2); !ok || err != nil || !from.Is4() || !to.Is4() {
		return Range{}, fmt.Errorf("server: read address range %q: want FIRST-LAST, such as 10.77.0.100-10.77.0.199", s)
	}
	return Range{from, to}, nil
}

// String returns "FIRST-LAST".
func (r Range) String() string { return r.From.String() + "-" + r.To.String() }

// Config says where and how to serve.
type Config struct {
	// Interface is the network interface to serve on.
	Interface string
	// Mode is off, full or proxy. Off serves the files and no DHCP.
	Mode pxe.Mode
	// Address is our address on the interface; its first IPv4 address by
	// default.
	Address netip.Addr
	// Range is leased in full mode.
	Range Range
	// Router and DNS are handed out in full mode, if set.
	Router netip.Addr
	DNS    []netip.Addr
	// Relayed are further ranges, reached through relay agents.
	Relayed []dhcp.Pool
	// Relays are networks of relay agents and clients behind them in proxy
	// mode; they are served besides the interface's own.
	Relays []netip.Prefix
	// TFTPAddr is where TFTP is served, ":69" by default: every address of
	// the interface.
	TFTPAddr string
	// HTTPAddr is where UEFI HTTP boot is served, ":7480" by default; "-"
	// switches it off. Without a host part it is our address.
	HTTPAddr string
	// HTTPSAddr is where HTTP boot with TLS is served, "" for nowhere; TLS
	// makes its configuration for our address, which the certificate must
	// name; by default a CA in StateDir does. With both HTTPS and HTTP, HTTP boot clients get an https URL first, and a
	// machine that does not fetch it the http one, unless HTTPSOnly.
	HTTPSAddr string
	TLS       func(netip.Addr) (*tls.Config, error)
	HTTPSOnly bool
	// StateDir keeps the leases and what was learnt of firmware. Required
	// in full mode; without it a proxy forgets when it stops.
	StateDir string
	// Images and Policy are required; Events is optional.
	Images ImageSource
	Policy PolicySource
	Events EventSink
	// WatchEvery, WatchWait and ProbeWait are dhcp.Config's.
	WatchEvery, WatchWait, ProbeWait time.Duration
	// LeaseTime and BootLeaseTime are dhcp.Config's.
	LeaseTime, BootLeaseTime time.Duration
	Log                      *slog.Logger
	// Now is time.Now by default.
	Now func() time.Time
}

func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("server: config: "+format, args...)) }
	if c.Interface == "" {
		bad("Interface is missing")
	}
	if c.Images == nil {
		bad("Images is missing")
	}
	if c.Policy == nil {
		bad("Policy is missing")
	}
	if c.HTTPSAddr != "" && c.TLS == nil && c.StateDir == "" {
		bad("HTTPSAddr needs StateDir, where its CA is kept, or TLS, a certificate")
	}
	if c.HTTPSOnly && c.HTTPSAddr == "" {
		bad("HTTPSOnly needs HTTPSAddr, where HTTPS is served")
	}
	switch c.Mode {
	case pxe.ModeOff, pxe.ModeProxy:
	case pxe.ModeFull:
		if !c.Range.From.IsValid() || !c.Range.To.IsValid() {
			bad("full mode needs Range, the addresses to lease")
		}
		if c.StateDir == "" {
			bad("full mode needs StateDir, where leases are kept")
		}
	default:
		bad("mode %s is unknown", c.Mode)
	}
	return errors.Join(errs...)
}

// Server is one boot host on one interface.
type Server struct {
	cfg      Config
	log      *slog.Logger
	machines *machines
	dhcp     *dhcp.Server
	tftp     *tftp.Server
	http     *httpboot.Server
	https    *httpboot.Server
	server   netip.Addr
	subnets  []netip.Prefix
}

// New opens everything, so that what is wrong is said at once and together
// with what to do about it. Run serves.
func New(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.HTTPAddr == "" {
		cfg.HTTPAddr = ":7480"
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Log.With("interface", cfg.Interface)}
	local, err := localPrefix(cfg.Interface, cfg.Address)
	if err != nil {
		return nil, err
	}
	s.server = local.Addr()
	s.subnets = append([]netip.Prefix{local.Masked()}, cfg.Relays...)
	for _, p := range cfg.Relayed {
		s.subnets = append(s.subnets, p.Subnet)
	}
	if cfg.StateDir != "" {
		if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
			return nil, fmt.Errorf("server: make state directory: %w", err)
		}
	}
	s.machines = newMachines(cfg.StateDir, s.log)
	if err := s.open(local); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Server) open(local netip.Prefix) error {
	cfg := s.cfg
	var err error
	if cfg.Mode != pxe.ModeOff {
		dc := dhcp.Config{Mode: cfg.Mode, Interface: cfg.Interface, Server: s.server, Relays: cfg.Relays,
			LeaseTime: cfg.LeaseTime, BootLeaseTime: cfg.BootLeaseTime, ProbeWait: cfg.ProbeWait,
			WatchEvery: cfg.WatchEvery, WatchWait: cfg.WatchWait,
			Own: ownAddrs(), Decider: s, Log: s.log, Now: cfg.Now}
		if cfg.Mode == pxe.ModeFull {
			dc.Leases = filepath.Join(cfg.StateDir, "leases")
			dc.Pools = append([]dhcp.Pool{{Subnet: local.Masked(), From: cfg.Range.From, To: cfg.Range.To, Router: cfg.Router, DNS: cfg.DNS}}, cfg.Relayed...)
		}
		if s.dhcp, err = dhcp.New(dc); err != nil {
			return err
		}
	}
	s.tftp, err = tftp.New(tftp.Config{Interface: cfg.Interface, Addr: cfg.TFTPAddr, Subnets: s.subnets, Source: tftpSource{s}, Progress: s.tftpProgress, Log: s.log})
	if err != nil {
		return err
	}
	if cfg.HTTPAddr != "-" {
		if strings.HasPrefix(cfg.HTTPAddr, ":") {
			// Like the rest, it is there for this network and no other.
			cfg.HTTPAddr = s.server.String() + cfg.HTTPAddr
		}
		s.http, err = httpboot.New(httpboot.Config{Addr: cfg.HTTPAddr, Source: httpSource{s}, Allow: s.served, Progress: s.httpProgress, Log: s.log})
		if err != nil {
			return err
		}
	}
	if cfg.HTTPSAddr != "" {
		if strings.HasPrefix(cfg.HTTPSAddr, ":") {
			cfg.HTTPSAddr = s.server.String() + cfg.HTTPSAddr
		}
		if cfg.TLS == nil {
			ca, err := httpboot.OpenCA(cfg.StateDir, cfg.Now())
			if err != nil {
				return err
			}
			s.log.Info("machines that shall boot by HTTPS need this CA in their firmware", "path", ca.Path)
			cfg.TLS = ca.TLS
		}
		tc, err := cfg.TLS(s.server)
		if err != nil {
			return fmt.Errorf("server: certificate for HTTPS boot: %w", err)
		}
		s.https, err = httpboot.New(httpboot.Config{Addr: cfg.HTTPSAddr, TLS: tc, Source: httpSource{s}, Allow: s.served, Progress: s.httpsProgress, Log: s.log})
		if err != nil {
			return err
		}
	}
	return nil
}

// Close releases a server that is not running.
func (s *Server) Close() error {
	var errs []error
	if s.dhcp != nil {
		errs = append(errs, s.dhcp.Close())
	}
	if s.tftp != nil {
		errs = append(errs, s.tftp.Close())
	}
	if s.http != nil {
		errs = append(errs, s.http.Close())
	}
	if s.https != nil {
		errs = append(errs, s.https.Close())
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends or one part fails, and returns with nothing left
// open. DHCP is told to stop together with the file servers: a machine that
// was just offered a file finds none and asks again.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	s.log.Info("network boot is up", "mode", s.cfg.Mode.String(), "address", s.server)
	if s.cfg.Mode == pxe.ModeOff {
		for _, a := range s.Advice() {
			s.Event(pxe.Event{Time: s.cfg.Now(), Text: a})
		}
	}
	if s.dhcp != nil {
		g.Go(func() error { return s.dhcp.Run(ctx) })
	}
	g.Go(func() error { return s.tftp.Run(ctx) })
	if s.http != nil {
		g.Go(func() error { return s.http.Run(ctx) })
	}
	if s.https != nil {
		g.Go(func() error { return s.https.Run(ctx) })
	}
	err := g.Wait()
	s.machines.save()
	return err
}

// Advice is one sentence per kind of client that there is an image for, with
// the options to set in another DHCP server.
func (s *Server) Advice() []string {
	var out []string
	images := s.images()
	for _, cpu := range cpus {
		img, ok := images[cpu]
		if !ok {
			continue
		}
		out = append(out, pxe.Advice(pxe.Boot{VendorClass: pxe.VendorPXE, Server: s.server, File: img.Path, CPU: cpu}))
		if s.https != nil {
			url := fmt.Sprintf("https://%s/%s", netip.AddrPortFrom(s.server, s.https.Addr().Port()), img.Path)
			out = append(out, pxe.Advice(pxe.Boot{VendorClass: pxe.VendorHTTP, Server: s.server, File: url, CPU: cpu}))
		}
		if s.http != nil && !s.cfg.HTTPSOnly {
			url := fmt.Sprintf("http://%s/%s", netip.AddrPortFrom(s.server, s.http.Addr().Port()), img.Path)
			out = append(out, pxe.Advice(pxe.Boot{VendorClass: pxe.VendorHTTP, Server: s.server, File: url, CPU: cpu}))
		}
	}
	if len(out) == 0 {
		out = append(out, "there is no recovery image to serve yet")
	}
	return out
}

// Address is our address on the interface.
func (s *Server) Address() netip.Addr { return s.server }

// Leases returns the leases that have not ended (full mode).
func (s *Server) Leases() []dhcp.Lease {
	if s.dhcp == nil {
		return nil
	}
	return s.dhcp.Leases()
}

// Stopped says why leasing has stopped, "" if it has not.
func (s *Server) Stopped() string {
	if s.dhcp == nil {
		return ""
	}
	return s.dhcp.Stopped()
}

func (s *Server) served(a netip.Addr) bool {
	for _, p := range s.subnets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func localPrefix(name string, want netip.Addr) (netip.Prefix, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("server: find interface %s: %w", name, err)
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("server: read addresses of %s: %w", name, err)
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().Is4() && (!want.IsValid() || want == p.Addr()) {
			return p, nil
		}
	}
	if want.IsValid() {
		return netip.Prefix{}, fmt.Errorf("server: interface %s does not have the address %s", name, want)
	}
	return netip.Prefix{}, fmt.Errorf("server: interface %s has no IPv4 address: give it one first", name)
}

// ownAddrs lists every IPv4 address of this host, so that the watch for
// foreign servers never takes us for one.
func ownAddrs() []netip.Addr {
	var out []netip.Addr
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			out = append(out, p.Addr())
		}
	}
	return out
}
