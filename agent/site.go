package agent

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// Caps of site.json: it is written by our own image builder, but it is read
// by PID 1, where a surprise means a machine that does not come up.
const (
	MaxSiteConfig = 256 << 10
	maxCentres    = 16
	maxDNS        = 8
)

// ParseSiteConfig reads site.json strictly: unknown fields, trailing bytes
// and wrong forms are errors, since a typo in a network setting would
// otherwise show up as a machine that is silently deaf. It returns every
// problem found, joined.
func ParseSiteConfig(b []byte) (fleet.SiteConfig, error) {
	var c fleet.SiteConfig
	if len(b) > MaxSiteConfig {
		return c, fmt.Errorf("agent: read site.json: %d bytes, at most %d are allowed", len(b), MaxSiteConfig)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return fleet.SiteConfig{}, fmt.Errorf("agent: read site.json: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fleet.SiteConfig{}, errors.New("agent: read site.json: something follows the object")
	}
	if err := validateSite(c); err != nil {
		return fleet.SiteConfig{}, err
	}
	return c, nil
}

func validateSite(c fleet.SiteConfig) error {
	var errs []error
	bad := func(format string, a ...any) {
		errs = append(errs, fmt.Errorf("agent: site.json: "+format, a...))
	}
	if c.Format != fleet.SiteConfigFormat {
		bad("format is %.40q, want %q", c.Format, fleet.SiteConfigFormat)
	}
	if c.Scan != nil {
		validateScan(c, bad)
		return errors.Join(errs...)
	}
	if len(c.Centre) == 0 || len(c.Centre) > maxCentres {
		bad("centre: want 1 to %d URLs, got %d", maxCentres, len(c.Centre))
	}
	for _, s := range c.Centre[:min(len(c.Centre), maxCentres)] {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			bad("centre: %.80q is not an https URL of a host", s)
		}
	}
	block, _ := pem.Decode([]byte(c.RootsPEM))
	if block == nil || block.Type != "CERTIFICATE" {
		bad("roots_pem holds no certificate: the centre could not be recognised")
	}
	validateNetwork(c.Network, bad)
	return errors.Join(errs...)
}

// validateScan: an image that scans calls nobody, so that whatever says how to
// call was meant for another image.
func validateScan(c fleet.SiteConfig, bad func(string, ...any)) {
	if len(c.Centre) > 0 || c.Claim != "" || c.Network.Address != "" || c.Network.VLAN != 0 || c.Network.Proxy != "" {
		bad("scan: an image that scans calls nobody: centre, claim and network do not go with it")
	}
	if s := c.Scan.Site; s != "" {
		if err := fleet.ValidateName("site", s); err != nil {
			bad("scan.site: %v", err)
		}
	}
}

func validateNetwork(n fleet.NetworkConfig, bad func(string, ...any)) {
	var prefix netip.Prefix
	if n.Address != "" {
		p, err := netip.ParsePrefix(n.Address)
		if err != nil || p.Addr().IsUnspecified() || p.Addr().IsMulticast() || p.Addr().IsLoopback() {
			bad("network.address: %.60q is not a host address with prefix length, as 192.0.2.10/24", n.Address)
		}
		prefix = p
	}
	if n.Gateway != "" {
		g, err := netip.ParseAddr(n.Gateway)
		switch {
		case err != nil:
			bad("network.gateway: %.60q is not an address", n.Gateway)
		case n.Address == "":
			bad("network.gateway without network.address: DHCP decides the gateway")
		case prefix.IsValid() && (!prefix.Contains(g) || g == prefix.Addr()):
			bad("network.gateway: %s is no neighbour in %s", g, prefix.Masked())
		}
	}
	if len(n.DNS) > maxDNS {
		bad("network.dns: %d servers, at most %d", len(n.DNS), maxDNS)
	}
	for _, s := range n.DNS[:min(len(n.DNS), maxDNS)] {
		if _, err := netip.ParseAddr(s); err != nil {
			bad("network.dns: %.60q is not an address", s)
		}
	}
	if n.VLAN < 0 || n.VLAN > 4094 {
		bad("network.vlan: %d is not in 1..4094", n.VLAN)
	}
	if n.Proxy != "" {
		u, err := url.Parse(n.Proxy)
		if err != nil || u.Scheme != "http" || u.Hostname() == "" || u.User != nil {
			bad("network.proxy: %.80q is not http://host:port", n.Proxy)
		}
	}
	if n.MAC != "" && !looksLikeMAC(n.MAC) {
		bad("network.mac: %.40q is not a MAC address, as 52:54:00:12:34:56", n.MAC)
	}
}

// looksLikeMAC accepts the form the kernel prints, in either case.
func looksLikeMAC(s string) bool {
	parts := strings.Split(s, ":")
	if len(parts) != 6 {
		return false
	}
	for _, p := range parts {
		if len(p) != 2 || strings.Trim(strings.ToLower(p), "0123456789abcdef") != "" {
			return false
		}
	}
	return true
}
