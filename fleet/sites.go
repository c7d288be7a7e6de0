package fleet

import (
	"slices"
	"time"
)

// Site is a physical place with one LAN and one cluster.
type Site struct {
	Meta
	Title    string `json:"title,omitempty"`
	Location string `json:"location,omitempty"`
	// Spec is what people want, Status what the site's nodes last said.
	Spec   SiteSpec   `json:"spec"`
	Status SiteStatus `json:"status,omitzero"`
	// Ledger is what the centre itself did for the site.
	Ledger SiteLedger `json:"ledger,omitzero"`
}

// PoolSite is the name that stands for "approved, but no site yet" in
// certificates and lists. No site may have it.
const PoolSite = "pool"

// SiteSpec is the desired side of a site.
type SiteSpec struct {
	// Stack and Version name the StackVersion the site shall run.
	Stack   string `json:"stack,omitempty"`
	Version string `json:"version,omitempty"`
	// StackSHA256 is over the envelope of that version.
	StackSHA256 HexBytes `json:"stack_sha256,omitempty"`
	// Charter is the version of the newest charter given to the site.
	Charter DocVersion `json:"charter,omitzero"`
	// Settings are what people chose for the charter; nil: nobody chose.
	Settings *SiteSettings `json:"settings,omitempty"`
}

// SiteSettings are the parts of a charter that people choose. Images and the
// escrow key come from the tenant.
type SiteSettings struct {
	Founding Founding      `json:"founding"`
	Policy   SitePolicy    `json:"policy"`
	Birth    BirthSettings `json:"birth"`
	// Images narrow the allowed images to these ("name@version"); none: all
	// that the tenant registered.
	Images []string `json:"images,omitempty"`
	// AnyBoot gives join material to nodes whatever they run (lab only).
	AnyBoot bool `json:"any_boot,omitempty"`
	// Delegates are PKIX DER public keys that may sign Admissions and
	// Removals too.
	Delegates [][]byte `json:"delegates,omitempty"`
	// Update is when and how nodes go to another version; nil: DefaultUpdate.
	Update *UpdatePolicy `json:"update,omitempty"`
	// Install is which disk the centre orders installed when a node comes to
	// the site and the site has a stack; nil: a person orders it.
	Install *DiskRule `json:"install,omitempty"`
}

// StackRef names the stack version that the site shall run, nil for none.
func (s SiteSpec) StackRef() *StackRef {
	if s.Stack == "" {
		return nil
	}
	return &StackRef{Name: s.Stack, Version: s.Version, SHA256: s.StackSHA256}
}

// DefaultSettings are those of a site for which nobody chose.
func DefaultSettings() SiteSettings {
	return SiteSettings{Founding: Founding{Mode: FoundCentral}, Policy: DefaultPolicy(), Birth: DefaultBirth()}
}

// Chosen returns the settings of the site, or the default ones.
func (s SiteSpec) Chosen() SiteSettings {
	if s.Settings == nil {
		return DefaultSettings()
	}
	return *s.Settings
}

// SiteStatus is the reported side of a site. It is as old as Seen says.
type SiteStatus struct {
	Seen time.Time `json:"seen,omitzero"`
	// Generation echoes Meta.Generation of the spec that the site has seen.
	Generation int64  `json:"generation,omitempty"`
	Stack      string `json:"stack,omitempty"`
	Version    string `json:"version,omitempty"`
	// ClusterUID, ClusterEpoch, ClusterVersion, Founder and Members are from
	// the newest cluster record that a node of the site showed and whose
	// signature is good. Members are the confirmed servers.
	ClusterUID     string   `json:"cluster_uid,omitempty"`
	ClusterEpoch   uint64   `json:"cluster_epoch,omitempty"`
	ClusterVersion uint64   `json:"cluster_version,omitempty"`
	Founder        NodeID   `json:"founder,omitempty"`
	Members        []NodeID `json:"members,omitempty"`
	// Servers and Workers count joined nodes.
	Servers int `json:"servers,omitempty"`
	Workers int `json:"workers,omitempty"`
	// Blocker is one sentence on what the site waits for, "" if nothing.
	Blocker string `json:"blocker,omitempty"`
	// Second is the UID of another cluster that nodes of this site showed,
	// SecondBy the node that did: a person has to look.
	Second   string `json:"second,omitempty"`
	SecondBy NodeID `json:"second_by,omitempty"`
}

// SiteLedger is the centre's own account of a site.
type SiteLedger struct {
	// Documents grows with each document and each order of the site.
	Documents DocVersion `json:"documents,omitzero"`
	// Grant is the founding right, once it was given (mode central).
	Grant *FoundingGrant `json:"grant,omitempty"`
	// Sure is the newest epoch of the centre's database in which it is known
	// whether the site has a cluster: because the site was made in it, has
	// reported in it, or a person confirmed it. In a later epoch the centre
	// was restored from a backup and may have forgotten a grant.
	Sure uint64 `json:"sure,omitempty"`
	// Doubt is why it is not known although Sure is this epoch, "" if it is.
	Doubt string `json:"doubt,omitempty"`
	// Ended are UIDs of clusters that were dissolved or declared lost.
	Ended []string `json:"ended,omitempty"`
}

// Unsure reports whether the centre may have forgotten what it granted; epoch
// is that of its database. Sites of the first schema have no Sure: no founding
// was granted then.
func (l SiteLedger) Unsure(epoch uint64) bool { return l.Doubt != "" || max(l.Sure, 1) < epoch }

// MaxEndedClusters bounds SiteLedger.Ended.
const MaxEndedClusters = 32

// HasEnded reports whether the cluster was dissolved or declared lost.
func (l SiteLedger) HasEnded(uid string) bool { return slices.Contains(l.Ended, uid) }

// FoundingGrant says who has the right to found the site's cluster.
type FoundingGrant struct {
	Node NodeID `json:"node"`
	// UID is what the node calls the cluster; "" until it has asked.
	UID string    `json:"uid,omitempty"`
	At  time.Time `json:"at"`
}

// Validate reports all problems of the site.
func (s Site) Validate() error {
	var p problems
	s.Meta.validate(&p, "site")
	p.check(s.Name != PoolSite, "the name %q stands for nodes without a site", PoolSite)
	p.text("title", s.Title)
	p.text("location", s.Location)
	p.check((s.Spec.Stack == "") == (s.Spec.Version == ""), "stack and version are given together or not at all")
	if s.Spec.Stack != "" {
		p.add(ValidateName("stack", s.Spec.Stack))
		p.add(ValidateVersion(s.Spec.Version))
		p.sha256("stack_sha256", s.Spec.StackSHA256, false)
	}
	if s.Spec.Settings != nil {
		s.Spec.Settings.validate(&p)
	}
	p.check(s.Status.Servers >= 0 && s.Status.Workers >= 0, "counts of servers and workers are negative")
	p.check(len(s.Ledger.Ended) <= MaxEndedClusters, "%d ended clusters, at most %d are allowed", len(s.Ledger.Ended), MaxEndedClusters)
	if g := s.Ledger.Grant; g != nil {
		p.add(g.Node.Validate())
	}
	return p.err("site")
}

// validate checks what a charter would check later, so that a person hears of
// it at once.
func (s SiteSettings) validate(p *problems) {
	s.Founding.validate(p)
	s.Policy.validate(p)
	s.Birth.validate(p)
	p.check(len(s.Images) <= maxCharterImages, "%d images, at most %d are allowed", len(s.Images), maxCharterImages)
	for _, i := range head(s.Images, maxCharterImages) {
		p.add(validateImageID(i))
	}
	validateDelegates(p, s.Delegates)
	if s.Update != nil {
		s.Update.validate(p)
	}
	if s.Install != nil {
		s.Install.validate(p)
	}
}

// Validate reports all problems of the settings.
func (s SiteSettings) Validate() error {
	var p problems
	s.validate(&p)
	return p.err("site settings")
}
