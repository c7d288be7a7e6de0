package netup

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

func offer(change ...func(*dhcpv4.DHCPv4)) *dhcpv4.DHCPv4 {
	m, err := dhcpv4.New(
		dhcpv4.WithYourIP(net.IPv4(192, 0, 2, 10)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithRouter(net.IPv4(192, 0, 2, 1)),
		dhcpv4.WithDNS(net.IPv4(192, 0, 2, 2)),
		dhcpv4.WithServerIP(net.IPv4(192, 0, 2, 1)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 0, 2, 1))),
		dhcpv4.WithLeaseTime(600),
	)
	if err != nil {
		panic(err)
	}
	for _, c := range change {
		c(m)
	}
	return m
}

func option(o dhcpv4.OptionCode, b ...byte) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.Options.Update(dhcpv4.OptGeneric(o, b)) }
}

func yours(a, b, c, d byte) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.YourIPAddr = net.IPv4(a, b, c, d) }
}

func TestLeaseOf(t *testing.T) {
	cases := []struct {
		name    string
		m       *dhcpv4.DHCPv4
		address string // "" means refused
		router  string
		dns     int
		lasts   time.Duration
	}{
		{"when all is plain then all is taken", offer(), "192.0.2.10/24", "192.0.2.1", 1, 10 * time.Minute},
		{"when there is no message then refuse", nil, "", "", 0, 0},
		{"when the address is 0.0.0.0, as proxies send it, then refuse", offer(yours(0, 0, 0, 0)), "", "", 0, 0},
		{"when the address is loopback then refuse", offer(yours(127, 0, 0, 1)), "", "", 0, 0},
		{"when the address is multicast then refuse", offer(yours(224, 0, 0, 1)), "", "", 0, 0},
		{"when the address is broadcast then refuse", offer(yours(255, 255, 255, 255)), "", "", 0, 0},
		{"when the address is link-local then refuse", offer(yours(169, 254, 1, 1)), "", "", 0, 0},
		{"when the address is the network's then refuse", offer(yours(192, 0, 2, 0)), "", "", 0, 0},
		{"when the address is the subnet's broadcast then refuse", offer(yours(192, 0, 2, 255)), "", "", 0, 0},
		{"when the mask has holes then refuse", offer(option(dhcpv4.OptionSubnetMask, 255, 0, 255, 0)), "", "", 0, 0},
		{"when the mask is /0 then refuse", offer(option(dhcpv4.OptionSubnetMask, 0, 0, 0, 0)), "", "", 0, 0},
		{"when the mask has three bytes then refuse", offer(option(dhcpv4.OptionSubnetMask, 255, 255, 255)), "", "", 0, 0},
		{"when the server is unnamed then refuse", offer(option(dhcpv4.OptionServerIdentifier)), "", "", 0, 0},
		{"when the router is elsewhere then do without", offer(option(dhcpv4.OptionRouter, 198, 51, 100, 1)), "192.0.2.10/24", "", 1, 10 * time.Minute},
		{"when the router is ourselves then do without", offer(option(dhcpv4.OptionRouter, 192, 0, 2, 10)), "192.0.2.10/24", "", 1, 10 * time.Minute},
		{"when the second router is good then take it", offer(option(dhcpv4.OptionRouter, 0, 0, 0, 0, 192, 0, 2, 3)), "192.0.2.10/24", "192.0.2.3", 1, 10 * time.Minute},
		{"when name servers are many and odd then take three good ones", offer(option(dhcpv4.OptionDomainNameServer, 127, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 255, 255, 255, 255, 3, 3, 3, 3, 4, 4, 4, 4, 9)), "192.0.2.10/24", "192.0.2.1", 3, 10 * time.Minute},
		{"when the lease is of zero seconds then a minute", offer(option(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 0)), "192.0.2.10/24", "192.0.2.1", 1, time.Minute},
		{"when the lease is for ever then a week", offer(option(dhcpv4.OptionIPAddressLeaseTime, 255, 255, 255, 255)), "192.0.2.10/24", "192.0.2.1", 1, 7 * 24 * time.Hour},
		{"when the lease time has two bytes then an hour", offer(option(dhcpv4.OptionIPAddressLeaseTime, 1, 1)), "192.0.2.10/24", "192.0.2.1", 1, time.Hour},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, err := leaseOf(c.m)
			if c.address == "" {
				if err == nil {
					t.Fatalf("accepted: %+v", l)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			router := ""
			if l.Router.IsValid() {
				router = l.Router.String()
			}
			if l.Address.String() != c.address || router != c.router || len(l.DNS) != c.dns || l.For != c.lasts {
				t.Errorf("got %+v", l)
			}
		})
	}
}

func FuzzLease(f *testing.F) {
	f.Add(offer().ToBytes())
	f.Add(offer(option(dhcpv4.OptionRouter, 1)).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := dhcpv4.FromBytes(b)
		if err != nil {
			return
		}
		l, err := leaseOf(m)
		if err != nil {
			return
		}
		switch a := l.Address.Addr(); {
		case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast():
			t.Fatalf("address %s", a)
		case l.Router.IsValid() && (!l.Address.Contains(l.Router) || l.Router == a):
			t.Fatalf("router %s for %s", l.Router, l.Address)
		case len(l.DNS) > maxServers || l.For < minLease || l.For > maxLease:
			t.Fatalf("caps do not hold: %+v", l)
		}
	})
}

func TestHold(t *testing.T) {
	lease := Lease{Address: netip.MustParsePrefix("192.0.2.10/24"), For: 10 * time.Minute}
	t.Run("when nobody answers then the lease ends on time, after several tries", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start, tries := time.Now(), 0
			err := hold(t.Context(), lease, func(context.Context) (Lease, error) {
				tries++
				return Lease{}, errors.New("silence")
			}, func(Lease) error { t.Error("renewed"); return nil })
			if took := time.Since(start); err == nil || took != lease.For || tries < 4 || tries > 12 {
				t.Errorf("%v after %s and %d tries", err, took, tries)
			}
		})
	})
	t.Run("when the server refuses then the lease ends at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			err := hold(t.Context(), lease, func(context.Context) (Lease, error) { return Lease{}, errRefused }, nil)
			if took := time.Since(start); !errors.Is(err, errRefused) || took != lease.For/2 {
				t.Errorf("%v after %s", err, took)
			}
		})
	})
	t.Run("when the server renews then it goes on until told to stop", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			err := hold(ctx, lease, func(context.Context) (Lease, error) { return lease, nil }, func(Lease) error {
				if n++; n == 100 {
					cancel()
				}
				return nil
			})
			if !errors.Is(err, context.Canceled) || n != 100 {
				t.Errorf("%v after %d renewals", err, n)
			}
		})
	})
}

func TestNICLine(t *testing.T) {
	for want, n := range map[string]NIC{
		"no link":     {Phase: NoLink},
		"asking DHCP": {Phase: Asking},
		"asking DHCP, no answer in 3 rounds: odd": {Phase: Asking, Attempts: 3, Detail: "odd"},
		"broken: x":                         {Phase: Broken, Detail: "x"},
		"192.0.2.1/24":                      {Phase: Up, Name: "e", Device: "e", Address: netip.MustParsePrefix("192.0.2.1/24")},
		"192.0.2.1/24 via 192.0.2.9 on e.7": {Phase: Up, Name: "e", Device: "e.7", Address: netip.MustParsePrefix("192.0.2.1/24"), Router: netip.MustParseAddr("192.0.2.9")},
	} {
		if got := n.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
