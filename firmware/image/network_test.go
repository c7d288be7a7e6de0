package image

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

func TestNetworkCombinations(t *testing.T) {
	static := fleet.NetworkConfig{
		Address: "192.0.2.10/24", Gateway: "192.0.2.1", DNS: []string{"198.51.100.1"},
		VLAN: 7, Proxy: "http://proxy.example:3128", MAC: "52:54:00:12:34:56",
	}
	with := func(change func(*fleet.NetworkConfig)) fleet.NetworkConfig {
		n := static
		change(&n)
		return n
	}
	for when, n := range map[string]fleet.NetworkConfig{
		"all is by DHCP":              {},
		"all is given":                static,
		"only the VLAN is given":      {VLAN: 4094},
		"the VLAN is on one card":     {VLAN: 7, MAC: static.MAC},
		"the gateway is link-local":   {Address: "2001:db8::5/64", Gateway: "fe80::1"},
		"the network has two members": {Address: "192.0.2.0/31", Gateway: "192.0.2.1"},
		"the name server is a neighbour and there is no gateway": {Address: "192.0.2.10/24", DNS: []string{"192.0.2.2"}},
		"the proxy is an IPv6 address":                           {Proxy: "http://[2001:db8::1]:8080/"},
	} {
		if err := checkNetwork(n); err != nil {
			t.Errorf("when %s, then %v", when, err)
		}
	}
	for when, c := range map[string]struct {
		n       fleet.NetworkConfig
		problem string
	}{
		"the gateway is elsewhere":       {with(func(n *fleet.NetworkConfig) { n.Gateway = "192.0.3.1" }), "cannot be reached"},
		"the gateway is the machine":     {with(func(n *fleet.NetworkConfig) { n.Gateway = "192.0.2.10" }), "own --address"},
		"the gateway is the broadcast":   {with(func(n *fleet.NetworkConfig) { n.Gateway = "192.0.2.255" }), "cannot be reached"},
		"the gateway is of IPv6":         {with(func(n *fleet.NetworkConfig) { n.Gateway = "fe80::1" }), "cannot be reached"},
		"the address is the network":     {with(func(n *fleet.NetworkConfig) { n.Address = "192.0.2.0/24" }), "no address that a machine"},
		"the address is the broadcast":   {with(func(n *fleet.NetworkConfig) { n.Address = "192.0.2.255/24" }), "no address that a machine"},
		"the address is loopback":        {with(func(n *fleet.NetworkConfig) { n.Address = "127.0.0.1/8" }), "no address that a machine"},
		"the address is multicast":       {with(func(n *fleet.NetworkConfig) { n.Address = "224.0.0.5/24" }), "no address that a machine"},
		"the name server is nobody":      {with(func(n *fleet.NetworkConfig) { n.DNS = []string{"0.0.0.0"} }), "no address of a name server"},
		"the name server is unreachable": {with(func(n *fleet.NetworkConfig) { n.Gateway = "" }), "needs --gateway"},
		"name servers come without":      {fleet.NetworkConfig{DNS: []string{"192.0.2.2"}}, "--dns needs --address"},
		"a card is named for nothing":    {fleet.NetworkConfig{MAC: static.MAC}, "--mac needs"},
		"the card is a group":            {with(func(n *fleet.NetworkConfig) { n.MAC = "01:00:5e:00:00:01" }), "multicast"},
		"the card is InfiniBand":         {with(func(n *fleet.NetworkConfig) { n.MAC = "02:00:5e:10:00:00:00:01" }), "--mac"},
		"the proxy is by TLS":            {with(func(n *fleet.NetworkConfig) { n.Proxy = "https://p:1" }), "--proxy"},
		"the proxy has a path":           {with(func(n *fleet.NetworkConfig) { n.Proxy = "http://p:1/x" }), "nothing after it"},
		"the proxy has port 0":           {with(func(n *fleet.NetworkConfig) { n.Proxy = "http://p:0" }), "65535"},
		"the proxy's port is too large":  {with(func(n *fleet.NetworkConfig) { n.Proxy = "http://p:70000" }), "65535"},
		"the proxy has no host":          {with(func(n *fleet.NetworkConfig) { n.Proxy = "http://:3128" }), "--proxy"},
		"the VLAN is negative":           {with(func(n *fleet.NetworkConfig) { n.VLAN = -1 }), "--vlan"},
	} {
		if err := checkNetwork(c.n); err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("when %s, then want a problem %q, got %v", when, c.problem, err)
		}
	}

	all := fleet.NetworkConfig{Gateway: "x", DNS: []string{"y"}, VLAN: 5000, Proxy: "z", MAC: "w"}
	err := checkNetwork(all)
	for _, flag := range []string{"--gateway", "--dns", "--vlan", "--proxy", "--mac"} {
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("want all problems at once, also of %s, got %v", flag, err)
		}
	}
}

func TestTheCentreMustBeWithinReach(t *testing.T) {
	site := func(centre string, n fleet.NetworkConfig) fleet.SiteConfig {
		return fleet.SiteConfig{Centre: []string{centre}, Network: n}
	}
	const own, gateway = "192.0.2.10/24", "192.0.2.1"
	dns := []string{"192.0.2.1"}
	for when, c := range map[string]struct {
		site    fleet.SiteConfig
		problem string // "" for none
	}{
		"DHCP brings name servers":         {site("https://c.example", fleet.NetworkConfig{}), ""},
		"a name meets a name server":       {site("https://c.example", fleet.NetworkConfig{Address: own, Gateway: gateway, DNS: dns}), ""},
		"a name meets no name server":      {site("https://c.example", fleet.NetworkConfig{Address: own, Gateway: gateway}), "--dns"},
		"the centre is a neighbour":        {site("https://192.0.2.2:7444", fleet.NetworkConfig{Address: own}), ""},
		"the centre is far":                {site("https://198.51.100.2:7444", fleet.NetworkConfig{Address: own, Gateway: gateway}), ""},
		"the centre is far, no gateway":    {site("https://198.51.100.2:7444", fleet.NetworkConfig{Address: own}), "--gateway"},
		"the proxy knows the name":         {site("https://c.example", fleet.NetworkConfig{Address: own, Proxy: "http://192.0.2.2:1"}), ""},
		"the proxy's name is unknown":      {site("https://192.0.2.2", fleet.NetworkConfig{Address: own, Proxy: "http://p:1"}), "--proxy"},
		"the proxy is far":                 {site("https://c.example", fleet.NetworkConfig{Address: own, Proxy: "http://198.51.100.2:1"}), "--gateway"},
		"the address is none, said before": {site("https://c.example", fleet.NetworkConfig{Address: "x"}), ""},
	} {
		err := checkReach(c.site)
		if (err != nil) != (c.problem != "") || err != nil && !strings.Contains(err.Error(), c.problem) {
			t.Errorf("when %s, then want a problem %q, got %v", when, c.problem, err)
		}
	}
	two := fleet.SiteConfig{Centre: []string{"https://a.example", "https://198.51.100.2"}, Network: fleet.NetworkConfig{Address: own}}
	if err := checkReach(two); err == nil || !strings.Contains(err.Error(), "a.example") || !strings.Contains(err.Error(), "198.51.100.2") {
		t.Errorf("want both centres named, got %v", err)
	}
}

// hostOf agrees with counting up the network.
func TestHostOf(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.IntRange(24, 32).Draw(t, "bits")
		b := [4]byte{192, 0, 2, rapid.Byte().Draw(t, "own")}
		p := netip.PrefixFrom(netip.AddrFrom4(b), bits)
		b[3] = rapid.Byte().Draw(t, "other")
		a := netip.AddrFrom4(b)
		first := p.Masked().Addr()
		last := first
		for next := first; p.Contains(next); next = next.Next() {
			last = next
		}
		want := p.Contains(a) && (bits >= 31 || a != first && a != last)
		if got := hostOf(a, p); got != want {
			t.Fatalf("%s in %s: %v, want %v", a, p, got, want)
		}
	})
}

// What the flags say is what the machine reads.
func TestNetworkGetsIntoTheImage(t *testing.T) {
	cfg := fakeConfig(t)
	cfg.Site.Network = fleet.NetworkConfig{
		Address: "192.0.2.10/24", Gateway: "192.0.2.1", DNS: []string{"192.0.2.1"},
		VLAN: 7, Proxy: "http://proxy.example:3128", MAC: "52:54:00:12:34:56",
	}
	m, err := compose(cfg, fakeInputs())
	if err != nil {
		t.Fatal(err)
	}
	var site fleet.SiteConfig
	if err := json.Unmarshal(initrdFile(t, m.efi, "etc/muster/site.json"), &site); err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(site.Network)
	if err != nil {
		t.Fatal(err)
	}
	want, err := json.Marshal(cfg.Site.Network)
	if err != nil || string(got) != string(want) {
		t.Errorf("the machine reads %s, the flags say %s (%v)", got, want, err)
	}
}
