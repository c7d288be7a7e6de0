package fleet

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// The documents that the centre signs with a tenant's orders key. Each is the
// JSON payload of a DSSE envelope (package statement) with its own payload
// type, so that one kind can never be taken for another. Nodes keep them on
// disk and pass them on; they need no centre to use them.
const (
	CharterFormat   = "muster/charter/v1"
	AdmissionFormat = "muster/admission/v1"
	RemovalFormat   = "muster/removal/v1"
	OrderFormat     = "muster/order/v1"

	CharterPayload      = "application/vnd.muster.charter.v1+json"
	AdmissionPayload    = "application/vnd.muster.admission.v1+json"
	RemovalPayload      = "application/vnd.muster.removal.v1+json"
	OrderPayload        = "application/vnd.muster.order.v1+json"
	StackVersionPayload = "application/vnd.muster.stack-version.v1+json"
	// ClusterRecordPayload and EscrowOfferPayload are signed by nodes.
	ClusterRecordPayload = "application/vnd.muster.cluster-record.v1+json"
	EscrowOfferPayload   = "application/vnd.muster.escrow-offer.v1+json"
)

// FoundingMode says who has the right to start the site's cluster.
type FoundingMode string

const (
	// FoundCentral: the centre grants the right to one node, once.
	FoundCentral FoundingMode = "central"
	// FoundNamed: the charter names the founder; no centre is needed.
	FoundNamed FoundingMode = "named"
	// FoundFirst: the first node of an offline site, after a survey.
	FoundFirst FoundingMode = "first"
)

// Charter is the constitution of a site: policy, founding, allowed images and
// the settings that a cluster gets at birth and keeps.
type Charter struct {
	// Format is CharterFormat.
	Format  string     `json:"format"`
	Tenant  string     `json:"tenant"`
	Site    string     `json:"site"`
	Version DocVersion `json:"version"`
	// Lab is true for tenants marked as a lab; it alone allows AnyBoot.
	Lab      bool            `json:"lab,omitempty"`
	Founding Founding        `json:"founding"`
	Policy   SitePolicy      `json:"policy"`
	Images   []ImageEvidence `json:"images"`
	// AnyBoot gives join material to nodes whatever they run.
	AnyBoot bool          `json:"any_boot,omitempty"`
	Birth   BirthSettings `json:"birth"`
	// Delegates are PKIX DER public keys that may sign Admissions and
	// Removals for this site too.
	Delegates [][]byte `json:"delegates,omitempty"`
	// EscrowKey is the tenant's X25519 public key, 32 bytes: nodes seal
	// snapshots and the tokens they need to it (package fleet/escrow). The
	// private half is with the operator. Empty: nothing is put in escrow.
	EscrowKey HexBytes `json:"escrow_key,omitempty"`
	// Stack is what the site's nodes shall run; nil: nothing is asked of them.
	Stack *StackRef `json:"stack,omitempty"`
	// Update is when and how they go there; nil: DefaultUpdate.
	Update *UpdatePolicy `json:"update,omitempty"`
	Issued time.Time     `json:"issued"`
}

// Recovery returns those of the charter's images that can be the recovery image
// with this name and version, whatever they are built for: firmware starts it
// by itself, so that it names no loader. Their manifests say the rest.
func (c Charter) Recovery(name, version string) (out []ImageRef) {
	for _, i := range c.Images {
		if i.Name == name && i.Version == version && len(i.Loader) == 0 && len(i.SHA256) > 0 {
			out = append(out, ImageRef{Name: i.Name, Version: i.Version, SHA256: i.SHA256})
		}
	}
	return out
}

// UpdatePolicy returns the policy of the charter, or the default one.
func (c Charter) UpdatePolicy() UpdatePolicy {
	if c.Update == nil {
		return DefaultUpdate()
	}
	return *c.Update
}

// Founding is the founding right of a charter.
type Founding struct {
	Mode FoundingMode `json:"mode"`
	// Founder and the ordered Successors are given in mode named only.
	Founder    NodeID   `json:"founder,omitempty"`
	Successors []NodeID `json:"successors,omitempty"`
}

// SitePolicy is how the site grows and heals. Durations are in seconds.
type SitePolicy struct {
	// Servers is the wanted number of k3s servers: 1 or 3.
	Servers int `json:"servers"`
	// PromoteAt is the number of ready nodes at which workers are promoted.
	PromoteAt int `json:"promote_at"`
	// PromoteAfter: so long the nodes must have been ready before it.
	PromoteAfter int64 `json:"promote_after_s"`
	// ReplaceAfter: a server that is away so long is replaced; 0 = never.
	ReplaceAfter int64 `json:"replace_after_s"`
}

// ImageEvidence is what a node's quote is compared with on the LAN.
type ImageEvidence struct {
	Name         string   `json:"name"`
	Version      string   `json:"version"`
	Authenticode HexBytes `json:"authenticode"`
	Kernel       HexBytes `json:"kernel,omitempty"`
	Loader       HexBytes `json:"loader,omitempty"`
	PCR11        HexBytes `json:"pcr11"`
	SignerCert   HexBytes `json:"signer_cert,omitempty"`
	// SHA256 is over the UKI: by it a node finds the manifest and the file of
	// the recovery image that belongs on its disk.
	SHA256 HexBytes `json:"sha256,omitempty"`
}

// BirthSettings are fixed for the life of the cluster.
type BirthSettings struct {
	ClusterCIDR       string   `json:"cluster_cidr"`
	ServiceCIDR       string   `json:"service_cidr"`
	ClusterDNS        string   `json:"cluster_dns"`
	FlannelBackend    string   `json:"flannel_backend"`
	SecretsEncryption bool     `json:"secrets_encryption"`
	Disable           []string `json:"disable,omitempty"`
	// MaxLearners is etcd's max-learners: 2 to promote both candidates at
	// once.
	MaxLearners int `json:"max_learners"`
	// NodeCIDR is the IPv4 network of the in-site addresses that Admissions
	// give to nodes: k3s and etcd know nodes by these, so that a new LAN
	// address changes routes and nothing else. "" means LAN addresses.
	NodeCIDR string `json:"node_cidr,omitempty"`
}

// DefaultPolicy and DefaultBirth are what a charter gets when nobody chose.
func DefaultPolicy() SitePolicy {
	return SitePolicy{Servers: 3, PromoteAt: 3, PromoteAfter: 60, ReplaceAfter: 24 * 3600}
}

// DefaultBirth returns the birth settings of a site for which nobody chose.
func DefaultBirth() BirthSettings {
	return BirthSettings{
		ClusterCIDR: "10.42.0.0/16", ServiceCIDR: "10.43.0.0/16", ClusterDNS: "10.43.0.10",
		FlannelBackend: "wireguard-native", SecretsEncryption: true, MaxLearners: 2,
		// Shared address space (RFC 6598): least likely to be somebody's LAN.
		NodeCIDR: "100.96.0.0/16",
	}
}

const (
	maxCharterImages = 64
	maxSuccessors    = 64
	maxDelegates     = 16
	maxDelegateKey   = 1024
	escrowKeySize    = 32
	// minNodeBits and maxNodeBits bound the prefix length of node_cidr: room
	// for at least 14 nodes, and no more than one former class A network.
	minNodeBits      = 8
	maxNodeBits      = 28
	maxDisable       = 32
	maxPolicySeconds = 366 * 24 * 3600
)

// Validate reports all problems of the charter.
func (c Charter) Validate() error {
	var p problems
	p.document(c.Format, CharterFormat, c.Tenant, c.Site, c.Issued)
	c.Founding.validate(&p)
	c.Policy.validate(&p)
	c.Birth.validate(&p)
	p.check(!c.AnyBoot || c.Lab, "any_boot is for lab tenants only")
	p.check(len(c.Images) <= maxCharterImages, "%d images, at most %d are allowed", len(c.Images), maxCharterImages)
	p.check(len(c.Images) > 0 || c.AnyBoot, "no image is allowed, so that no node could join")
	for _, i := range head(c.Images, maxCharterImages) {
		p.add(ValidateName("image", i.Name))
		p.add(ValidateVersion(i.Version))
		p.sha256("authenticode of image "+clip(i.Name, 80), i.Authenticode, true)
		p.sha256("kernel of image "+clip(i.Name, 80), i.Kernel, false)
		p.sha256("loader of image "+clip(i.Name, 80), i.Loader, false)
		p.sha256("pcr11 of image "+clip(i.Name, 80), i.PCR11, true)
		p.sha256("signer_cert of image "+clip(i.Name, 80), i.SignerCert, false)
		p.sha256("sha256 of image "+clip(i.Name, 80), i.SHA256, false)
	}
	p.check(len(c.EscrowKey) == 0 || len(c.EscrowKey) == escrowKeySize, "escrow_key has %d bytes; an X25519 public key has %d", len(c.EscrowKey), escrowKeySize)
	validateDelegates(&p, c.Delegates)
	if c.Stack != nil {
		c.Stack.validate(&p)
	}
	if c.Update != nil {
		c.Update.validate(&p)
	}
	return p.err("charter")
}

func validateDelegates(p *problems, keys [][]byte) {
	p.check(len(keys) <= maxDelegates, "%d delegates, at most %d are allowed", len(keys), maxDelegates)
	for i, d := range head(keys, maxDelegates) {
		p.check(len(d) > 0 && len(d) <= maxDelegateKey, "delegate %d has %d bytes; want 1 to %d", i, len(d), maxDelegateKey)
	}
}

func (f Founding) validate(p *problems) {
	p.check(len(f.Successors) <= maxSuccessors, "%d successors, at most %d are allowed", len(f.Successors), maxSuccessors)
	switch f.Mode {
	case FoundNamed:
		p.add(f.Founder.Validate())
		seen := map[NodeID]bool{f.Founder: true}
		for _, s := range head(f.Successors, maxSuccessors) {
			p.add(s.Validate())
			p.check(!seen[s], "node %s is named twice", clip(string(s), 80))
			seen[s] = true
		}
	case FoundCentral, FoundFirst:
		p.check(f.Founder == "" && len(f.Successors) == 0, "a founder is named in mode %q only", FoundNamed)
	default:
		p.check(false, "founding mode %q is none of %q, %q, %q", clip(string(f.Mode), 80), FoundCentral, FoundNamed, FoundFirst)
	}
}

func (s SitePolicy) validate(p *problems) {
	// Two servers lose their quorum with either of them, so that they are
	// worse than one.
	p.check(s.Servers == 1 || s.Servers == 3, "servers is %d; want 1 or 3", s.Servers)
	p.check(s.PromoteAt >= s.Servers && s.PromoteAt <= 1000, "promote_at is %d; want %d to 1000", s.PromoteAt, s.Servers)
	p.check(s.PromoteAfter >= 0 && s.PromoteAfter <= maxPolicySeconds, "promote_after_s is %d; want 0 to %d", s.PromoteAfter, maxPolicySeconds)
	p.check(s.ReplaceAfter >= 0 && s.ReplaceAfter <= maxPolicySeconds, "replace_after_s is %d; want 0 to %d", s.ReplaceAfter, maxPolicySeconds)
}

func (b BirthSettings) validate(p *problems) {
	cluster := p.prefix("cluster_cidr", b.ClusterCIDR)
	service := p.prefix("service_cidr", b.ServiceCIDR)
	if cluster.IsValid() && service.IsValid() {
		p.check(!cluster.Overlaps(service), "cluster_cidr %s and service_cidr %s overlap", cluster, service)
	}
	if b.NodeCIDR != "" {
		node := p.prefix("node_cidr", b.NodeCIDR)
		if node.IsValid() {
			p.check(node.Addr().Is4() && node.Bits() >= minNodeBits && node.Bits() <= maxNodeBits, "node_cidr %s; want an IPv4 network of /%d to /%d", node, minNodeBits, maxNodeBits)
			p.check(!cluster.IsValid() || !node.Overlaps(cluster), "node_cidr %s and cluster_cidr %s overlap", node, b.ClusterCIDR)
			p.check(!service.IsValid() || !node.Overlaps(service), "node_cidr %s and service_cidr %s overlap", node, b.ServiceCIDR)
		}
	}
	dns, err := netip.ParseAddr(b.ClusterDNS)
	if err != nil {
		p.check(false, "cluster_dns %q is no address", clip(b.ClusterDNS, 80))
	} else if service.IsValid() {
		p.check(service.Contains(dns), "cluster_dns %s is not in service_cidr %s", dns, service)
	}
	backends := []string{"wireguard-native", "vxlan", "host-gw", "none"}
	p.check(slices.Contains(backends, b.FlannelBackend), "flannel_backend %q is none of %v", clip(b.FlannelBackend, 80), backends)
	p.check(b.MaxLearners == 1 || b.MaxLearners == 2, "max_learners is %d; want 1 or 2", b.MaxLearners)
	p.check(len(b.Disable) <= maxDisable, "%d disabled parts, at most %d are allowed", len(b.Disable), maxDisable)
	for _, d := range head(b.Disable, maxDisable) {
		p.add(ValidateName("disabled part", d))
	}
}

func (p *problems) prefix(field, s string) netip.Prefix {
	x, err := netip.ParsePrefix(s)
	if err != nil || x.Masked() != x {
		p.check(false, "%s %q is no network in CIDR form", field, clip(s, 80))
		return netip.Prefix{}
	}
	return x
}

// document checks what all documents for a site have in common.
func (p *problems) document(format, want, tenant, site string, issued time.Time) {
	p.format(format, want)
	p.add(ValidateName("tenant", tenant))
	p.add(ValidateName("site", site))
	p.check(site != PoolSite, "the name %q stands for nodes without a site", PoolSite)
	p.check(!issued.IsZero(), "issued is not set")
}

// Admission is the fact that one node belongs to one site. Sets of admissions
// merge by union; a Removal of the same node and incarnation wins.
type Admission struct {
	// Format is AdmissionFormat.
	Format string `json:"format"`
	Tenant string `json:"tenant"`
	Site   string `json:"site"`
	Node   NodeID `json:"node"`
	// Incarnation starts at 1 and grows when a removed node comes back.
	Incarnation uint64 `json:"incarnation"`
	// LDevIDKey is SHA-256 over the PKIX DER of the node's LDevID key: what
	// peers compare in TLS.
	LDevIDKey HexBytes          `json:"ldevid_key"`
	Labels    map[string]string `json:"labels,omitempty"`
	// MayServe allows the node to become a k3s server.
	MayServe bool `json:"may_serve"`
	// Address is the node's in-site IPv4 address, unique in the site and the
	// same in all admissions of the node to it; from the charter's NodeCIDR.
	// "": the node is known by its LAN address.
	Address string     `json:"address,omitempty"`
	Version DocVersion `json:"version"`
	Issued  time.Time  `json:"issued"`
}

// Validate reports all problems of the admission.
func (a Admission) Validate() error {
	var p problems
	p.document(a.Format, AdmissionFormat, a.Tenant, a.Site, a.Issued)
	p.add(a.Node.Validate())
	p.check(a.Incarnation > 0, "incarnation is not set")
	p.sha256("ldevid_key", a.LDevIDKey, true)
	p.add(ValidateLabels(a.Labels))
	if a.Address != "" {
		at, err := netip.ParseAddr(a.Address)
		p.check(err == nil && at.Is4() && at.String() == a.Address && !at.IsUnspecified() && !at.IsLoopback() && !at.IsMulticast(),
			"address %q is no IPv4 address of a node", clip(a.Address, 80))
	}
	return p.err("admission")
}

// Removal is the fact that one incarnation of a node left a site for ever.
type Removal struct {
	// Format is RemovalFormat.
	Format      string     `json:"format"`
	Tenant      string     `json:"tenant"`
	Site        string     `json:"site"`
	Node        NodeID     `json:"node"`
	Incarnation uint64     `json:"incarnation"`
	LDevIDKey   HexBytes   `json:"ldevid_key"`
	Reason      string     `json:"reason,omitempty"`
	Version     DocVersion `json:"version"`
	Issued      time.Time  `json:"issued"`
}

// Validate reports all problems of the removal.
func (r Removal) Validate() error {
	var p problems
	p.document(r.Format, RemovalFormat, r.Tenant, r.Site, r.Issued)
	p.add(r.Node.Validate())
	p.check(r.Incarnation > 0, "incarnation is not set")
	p.sha256("ldevid_key", r.LDevIDKey, true)
	p.text("reason", r.Reason)
	return p.err("removal")
}

// OrderKind is what a node is told to do.
type OrderKind string

const (
	OrderInstall     OrderKind = "install"
	OrderWipe        OrderKind = "wipe"
	OrderRecover     OrderKind = "recover"
	OrderDowngrade   OrderKind = "downgrade"
	OrderClearFailed OrderKind = "clear-failed"
	OrderRestore     OrderKind = "restore"
	OrderDissolve    OrderKind = "dissolve"
	// OrderFound: the node founds the site's cluster, although the charter's
	// founder did not (mode named), or in place of one that was lost.
	OrderFound OrderKind = "found"
	// OrderReset: the node goes on from its own data, as the only server.
	OrderReset OrderKind = "reset"
)

var orderKinds = []OrderKind{OrderInstall, OrderWipe, OrderRecover, OrderDowngrade, OrderClearFailed, OrderRestore, OrderDissolve, OrderFound, OrderReset}

// Order is one signed act, for one node, until NotAfter. Whoever carries it
// out compares the target exactly: a disk that differs is not touched.
type Order struct {
	// Format is OrderFormat.
	Format string `json:"format"`
	// ID is chosen by the centre and unique in the tenant.
	ID     string    `json:"id"`
	Tenant string    `json:"tenant"`
	Site   string    `json:"site"`
	Node   NodeID    `json:"node"`
	Kind   OrderKind `json:"kind"`
	// Disk is the target of install and wipe; Image what install writes and
	// downgrade goes to; Snapshot what restore takes (the ID of a handed-over
	// escrow blob or the name of a snapshot on the node's disk); Digest the
	// image whose failure clear-failed forgets.
	Disk     *DiskTarget `json:"disk,omitempty"`
	Image    *ImageRef   `json:"image,omitempty"`
	Snapshot string      `json:"snapshot,omitempty"`
	Digest   HexBytes    `json:"digest,omitempty"`
	// KeepData: an install that finds our layout on the disk leaves the data
	// partition as it is.
	KeepData bool `json:"keep_data,omitempty"`
	// Cluster is the UID of the cluster that reset, restore and dissolve are
	// about. Epoch is what reset and restore raise it to: data of every
	// smaller epoch is void from then on. Into is the UID of the cluster that
	// a dissolved one is taken into.
	Cluster  string     `json:"cluster,omitempty"`
	Epoch    uint64     `json:"epoch,omitempty"`
	Into     string     `json:"into,omitempty"`
	Reason   string     `json:"reason,omitempty"`
	Version  DocVersion `json:"version"`
	Issued   time.Time  `json:"issued"`
	NotAfter time.Time  `json:"not_after"`
}

// DiskTarget names one disk by all that the disk says of itself.
type DiskTarget struct {
	Serial    string `json:"serial,omitempty"`
	WWN       string `json:"wwn,omitempty"`
	Model     string `json:"model,omitempty"`
	SizeBytes int64  `json:"size_bytes"`
}

// Matches reports whether d is exactly the target.
func (t DiskTarget) Matches(d Disk) bool {
	return (t.Serial != "" || t.WWN != "") && t.SizeBytes > 0 &&
		t.Serial == d.Serial && t.WWN == d.WWN && t.Model == d.Model && t.SizeBytes == d.SizeBytes
}

// Validate reports all problems of the order.
func (o Order) Validate() error {
	var p problems
	p.document(o.Format, OrderFormat, o.Tenant, o.Site, o.Issued)
	p.add(ValidateName("order", o.ID))
	p.add(o.Node.Validate())
	p.check(slices.Contains(orderKinds, o.Kind), "kind %q is none of %v", clip(string(o.Kind), 80), orderKinds)
	p.check(o.NotAfter.After(o.Issued), "not_after is not later than issued")
	onDisk := o.Kind == OrderInstall || o.Kind == OrderWipe
	p.check(onDisk == (o.Disk != nil), "a disk is the target of %s and %s, and only of these", OrderInstall, OrderWipe)
	if o.Disk != nil {
		p.check(o.Disk.Serial != "" || o.Disk.WWN != "", "the disk has neither serial nor WWN")
		p.check(o.Disk.SizeBytes > 0, "the size of the disk is not positive")
		p.text("disk serial", o.Disk.Serial)
		p.text("disk WWN", o.Disk.WWN)
		p.text("disk model", o.Disk.Model)
	}
	withImage := o.Kind == OrderInstall || o.Kind == OrderDowngrade
	p.check(withImage == (o.Image != nil), "an image belongs to %s and %s, and only to these", OrderInstall, OrderDowngrade)
	if o.Image != nil {
		o.Image.validate(&p)
	}
	p.check((o.Kind == OrderRestore) == (o.Snapshot != ""), "a snapshot belongs to %s, and only to it", OrderRestore)
	p.text("snapshot", o.Snapshot)
	p.check(!o.KeepData || o.Kind == OrderInstall, "keep_data belongs to %s, and only to it", OrderInstall)
	o.validateCluster(&p)
	p.check((o.Kind == OrderClearFailed) == (len(o.Digest) > 0), "a digest belongs to %s, and only to it", OrderClearFailed)
	p.sha256("digest", o.Digest, false)
	p.text("reason", o.Reason)
	return p.err("order")
}

func (o Order) validateCluster(p *problems) {
	about := o.Kind == OrderReset || o.Kind == OrderRestore || o.Kind == OrderDissolve
	p.check(about == (o.Cluster != ""), "a cluster belongs to %s, %s and %s, and only to these", OrderReset, OrderRestore, OrderDissolve)
	if o.Cluster != "" {
		p.add(ValidateClusterUID(o.Cluster))
	}
	raises := o.Kind == OrderReset || o.Kind == OrderRestore
	p.check(raises == (o.Epoch != 0), "an epoch belongs to %s and %s, and only to these", OrderReset, OrderRestore)
	p.check(o.Epoch <= MaxClusterEpoch, "epoch %d; at most %d is allowed", o.Epoch, uint64(MaxClusterEpoch))
	p.check((o.Kind == OrderDissolve) == (o.Into != ""), "into belongs to %s, and only to it", OrderDissolve)
	if o.Into != "" {
		p.add(ValidateClusterUID(o.Into))
		p.check(o.Into != o.Cluster, "cluster %q cannot be dissolved into itself", clip(o.Into, 80))
	}
}

// OrderState is the life of an order at the centre. The signed Order itself
// never changes; this stands beside it.
//
//	open ----> delivered ----> running ----> done
//	  |            |              +--------> failed
//	  |            +-------> failed            (refused by the node)
//	  +------------+-------> expired | withdrawn
type OrderState uint8

const (
	OrderOpen OrderState = iota
	OrderDelivered
	OrderRunning
	OrderDone
	OrderFailed
	OrderExpired
	OrderWithdrawn
)

var orderNames = [...]string{"open", "delivered", "running", "done", "failed", "expired", "withdrawn"}

// What runs cannot be withdrawn, and it does not expire: the node says how it
// ended. A node that was offline may report done for an order the centre
// thought expired or withdrawn.
var orderMoves = map[OrderState][]OrderState{
	OrderOpen:      {OrderDelivered, OrderExpired, OrderWithdrawn},
	OrderDelivered: {OrderRunning, OrderDone, OrderFailed, OrderExpired, OrderWithdrawn},
	OrderRunning:   {OrderDone, OrderFailed},
	OrderExpired:   {OrderRunning, OrderDone, OrderFailed},
	OrderWithdrawn: {OrderRunning, OrderDone, OrderFailed},
}

// String returns the word used in the CLI, the API and the console.
func (s OrderState) String() string { return name(orderNames[:], int(s), "order state") }

// MarshalText implements encoding.TextMarshaler.
func (s OrderState) MarshalText() ([]byte, error) {
	return marshal(orderNames[:], int(s), "order state")
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *OrderState) UnmarshalText(b []byte) error {
	i, err := unmarshal(orderNames[:], b, "order state")
	if err == nil {
		*s = OrderState(i)
	}
	return err
}

// MoveTo returns to if the table of moves allows s -> to.
func (s OrderState) MoveTo(to OrderState) (OrderState, error) {
	if slices.Contains(orderMoves[s], to) {
		return to, nil
	}
	return s, fmt.Errorf("fleet: order cannot go from %s to %s", s, to)
}
