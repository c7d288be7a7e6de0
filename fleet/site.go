package fleet

import (
	"time"
)

// SiteConfig is site.json, the file inside the recovery image's initrd that
// tells a machine whom to trust and where to call. It is covered by the
// image's signature and measurement and holds no secret. DHCP never sets any
// of it.
type SiteConfig struct {
	// Format is SiteConfigFormat.
	Format string `json:"format"`
	// Image names the image this file was built into.
	Image   string `json:"image"`
	Version string `json:"version"`
	// Centre lists https URLs of the node endpoint, tried in order.
	Centre []string `json:"centre"`
	// RootsPEM are the centre's root CA certificates. Nothing else is trusted.
	RootsPEM string `json:"roots_pem"`
	// ReleaseKeys and OrdersKeys are PKIX public keys in PEM.
	ReleaseKeysPEM string `json:"release_keys_pem,omitempty"`
	OrdersKeysPEM  string `json:"orders_keys_pem,omitempty"`
	// TimeFloor: no clock reading before this instant is believed.
	TimeFloor time.Time `json:"time_floor"`
	// Claim is a claim code (`muster preapprove claim`). Whoever can read the
	// image can read it: it is worth one machine at one site, once, and only
	// a machine that the approval policy would let in.
	Claim   string        `json:"claim,omitempty"`
	Network NetworkConfig `json:"network,omitzero"`
	// Scan makes the image one for a warehouse: it calls nobody and adds each
	// machine to the list on the stick it was started from.
	Scan *ScanConfig `json:"scan,omitempty"`
}

// ScanConfig is for images that scan machines for pre-approval.
type ScanConfig struct {
	// Site is what the list says of every machine; "" leaves it open.
	Site string `json:"site,omitempty"`
}

// SiteConfigFormat is the value of SiteConfig.Format.
const SiteConfigFormat = "muster/site-config/v1"

// NetworkConfig is for sites without DHCP or with a tagged VLAN or a proxy.
type NetworkConfig struct {
	// Address is CIDR, e.g. 192.0.2.10/24; empty means DHCP.
	Address string   `json:"address,omitempty"`
	Gateway string   `json:"gateway,omitempty"`
	DNS     []string `json:"dns,omitempty"`
	VLAN    int      `json:"vlan,omitempty"`
	// Proxy is an HTTP CONNECT proxy, http://host:port.
	Proxy string `json:"proxy,omitempty"`
	// MAC picks the interface for the static address; empty: every one.
	MAC string `json:"mac,omitempty"`
}
