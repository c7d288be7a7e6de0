package fleet_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/fleettest"
)

var now = time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC)

func roundTrip[T any](t *testing.T, adjust func(*T)) {
	t.Helper()
	rapid.Check(t, func(t *rapid.T) {
		in := fleettest.Draw[T](t)
		if adjust != nil {
			adjust(&in)
		}
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var out T
		if err := json.Unmarshal(b, &out); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if !reflect.DeepEqual(in, out) {
			t.Fatalf("%s:\n%+v became\n%+v", b, in, out)
		}
	})
}

func TestJSONRoundTrips(t *testing.T) {
	// The digest is not in the JSON: the ID is its prefix, and the rest is
	// for the store alone.
	t.Run("Request", func(t *testing.T) {
		roundTrip(t, func(r *fleet.Request) { r.EvidenceDigest = [32]byte{} })
	})
	t.Run("Tenant", func(t *testing.T) { roundTrip[fleet.Tenant](t, nil) })
	t.Run("Site", func(t *testing.T) { roundTrip[fleet.Site](t, nil) })
	t.Run("Node", func(t *testing.T) { roundTrip[fleet.Node](t, nil) })
	t.Run("PreApproval", func(t *testing.T) { roundTrip[fleet.PreApproval](t, nil) })
	t.Run("Image", func(t *testing.T) { roundTrip[fleet.Image](t, nil) })
	t.Run("Charter", func(t *testing.T) { roundTrip[fleet.Charter](t, nil) })
	t.Run("Admission", func(t *testing.T) { roundTrip[fleet.Admission](t, nil) })
	t.Run("Removal", func(t *testing.T) { roundTrip[fleet.Removal](t, nil) })
	t.Run("Order", func(t *testing.T) { roundTrip[fleet.Order](t, nil) })
	t.Run("ClusterRecord", func(t *testing.T) { roundTrip[fleet.ClusterRecord](t, nil) })
	t.Run("EscrowOffer", func(t *testing.T) { roundTrip[fleet.EscrowOffer](t, nil) })
	t.Run("Stack", func(t *testing.T) { roundTrip[fleet.Stack](t, nil) })
	t.Run("StackVersion", func(t *testing.T) { roundTrip[fleet.StackVersion](t, nil) })
	t.Run("SystemReport", func(t *testing.T) { roundTrip[fleet.SystemReport](t, nil) })
	t.Run("Hardware", func(t *testing.T) { roundTrip[fleet.Hardware](t, nil) })
	t.Run("Event", func(t *testing.T) { roundTrip[fleet.Event](t, nil) })
	t.Run("AuditRecord", func(t *testing.T) { roundTrip[fleet.AuditRecord](t, nil) })
	t.Run("SiteConfig", func(t *testing.T) { roundTrip[fleet.SiteConfig](t, nil) })
}

// Every object survives whatever the network puts into it.
func TestValidateNeverPanics(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for _, v := range []interface{ Validate() error }{
			fleettest.Draw[fleet.Tenant](t), fleettest.Draw[fleet.Site](t), fleettest.Draw[fleet.Node](t),
			fleettest.Draw[fleet.PreApproval](t), fleettest.Draw[fleet.Image](t), fleettest.Draw[fleet.Charter](t),
			fleettest.Draw[fleet.Admission](t), fleettest.Draw[fleet.Removal](t), fleettest.Draw[fleet.Order](t),
			fleettest.Draw[fleet.Stack](t), fleettest.Draw[fleet.StackVersion](t), fleettest.Draw[fleet.Event](t),
			fleettest.Draw[fleet.AuditRecord](t), fleettest.Draw[fleet.ClusterRecord](t), fleettest.Draw[fleet.EscrowOffer](t),
			fleettest.Draw[fleet.SystemReport](t), fleettest.Draw[fleet.UpdatePolicy](t), fleettest.Draw[fleet.DiskRule](t),
		} {
			_ = v.Validate()
		}
	})
}

var (
	ek     = fleet.EKHash{1, 2, 3}
	digest = fleet.HexBytes(make([]byte, 32))
)

func goodMeta() fleet.Meta {
	return fleet.Meta{Tenant: "default", Name: "thing", Labels: map[string]string{"region": "eu", "example.com/x": ""}}
}

func goodNode() fleet.Node {
	return fleet.Node{
		ID: ek.NodeID(), EK: ek, Tenant: "default", Site: "shop-1", LDevIDKey: digest, Request: fleet.RequestIDOf(ek),
	}
}

func goodImage() fleet.Image {
	return fleet.Image{
		Tenant: "default", Name: "recovery", Version: "1.0", Kind: fleet.ImageRecovery, Arch: "amd64", Size: 1,
		SHA256: digest, Authenticode: digest, PCR11: digest,
	}
}

func goodCharter() fleet.Charter {
	return fleet.Charter{
		Format: fleet.CharterFormat, Tenant: "default", Site: "shop-1", Issued: now,
		Founding: fleet.Founding{Mode: fleet.FoundNamed, Founder: ek.NodeID()}, Policy: fleet.DefaultPolicy(),
		Birth:  fleet.DefaultBirth(),
		Images: []fleet.ImageEvidence{{Name: "slot", Version: "1", Authenticode: digest, PCR11: digest}},
	}
}

func goodStackRef() *fleet.StackRef {
	return &fleet.StackRef{Name: "shop", Version: "2027.1", SHA256: digest}
}

func goodUpdate() *fleet.UpdatePolicy {
	return &fleet.UpdatePolicy{
		Paused: true, DrainTimeout: 300, DrainForce: true, RateKbit: 20000,
		Windows: []fleet.UpdateWindow{{Days: []string{"mon", "tue"}, From: "02:30", Minutes: 180, UTCOffset: 60}},
	}
}

func goodSystem() fleet.SystemReport {
	return fleet.SystemReport{
		Tenant: "default", Site: "shop-1", Node: ek.NodeID(), At: now, Slot: fleet.SlotA, Image: "slot@1", ImageSHA256: digest,
		Stack: goodStackRef(), State: fleet.SystemWriting, Percent: 40, Target: "slot@2", TargetSHA256: digest,
		Failed: []fleet.FailedImage{{SHA256: digest, Image: "slot@0", Reason: "k3s never became ready", At: now}},
	}
}

func goodOrder() fleet.Order {
	return fleet.Order{
		Format: fleet.OrderFormat, ID: "o-1", Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Kind: fleet.OrderInstall,
		Disk:   &fleet.DiskTarget{Serial: "S", SizeBytes: 1},
		Image:  &fleet.ImageRef{Name: "slot", Version: "1", Arch: "amd64", SHA256: digest},
		Issued: now, NotAfter: now.Add(time.Hour),
	}
}

func goodAdmission() fleet.Admission {
	return fleet.Admission{
		Format: fleet.AdmissionFormat, Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Incarnation: 1,
		LDevIDKey: digest, Issued: now,
	}
}

func goodRecord() fleet.ClusterRecord {
	return fleet.ClusterRecord{
		Tenant: "default", Site: "shop-1", UID: "c-1", Epoch: 1, Founder: ek.NodeID(), Servers: []fleet.NodeID{ek.NodeID()},
	}
}

func goodStackVersion() fleet.StackVersion {
	return fleet.StackVersion{
		Format: fleet.StackVersionFormat, Tenant: "default", Stack: "shop", Version: "1", K3s: "v1.36.3+k3s1", EtcdMinor: "3.6",
		Images: []fleet.ImageRef{{Name: "slot", Version: "1", Arch: "amd64", SHA256: digest}}, Created: now,
	}
}

func goodRule() fleet.PreApproval {
	return fleet.PreApproval{
		Meta: goodMeta(), Kind: fleet.PreApproveRule, Limit: 1, NotAfter: now,
		MinIdentity: fleet.IdentityListed, MinBoot: fleet.BootMeasured,
	}
}

func goodClaim() fleet.PreApproval {
	return fleet.PreApproval{
		Meta: goodMeta(), Kind: fleet.PreApproveClaim, Limit: 1, NotAfter: now, Site: "shop-7", ClaimHash: digest,
	}
}

func goodEvent() fleet.Event {
	return fleet.Event{Tenant: "default", Time: now, Kind: "pxe.served", Text: "served recovery"}
}

// refused wants the unchanged object to be valid and each change to be named.
func refused[T interface{ Validate() error }](t *testing.T, good func() T, changes map[string]func(*T)) {
	t.Helper()
	if err := good().Validate(); err != nil {
		t.Errorf("the unchanged %T: %v", good(), err)
	}
	for word, change := range changes {
		v := good()
		change(&v)
		if err := v.Validate(); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%T with a wrong %s: %v", v, word, err)
		}
	}
	all := good()
	for _, change := range changes {
		change(&all)
	}
	err := all.Validate()
	if err == nil || len(changes) > 3 && strings.Count(err.Error(), "\n") < 2 {
		t.Errorf("%T with many problems names too few: %v", all, err)
	}
}

func TestValidate(t *testing.T) {
	refused(t, func() fleet.Tenant {
		m := goodMeta()
		m.Name = m.Tenant
		return fleet.Tenant{Meta: m}
	}, map[string]func(*fleet.Tenant){
		"equal":          func(v *fleet.Tenant) { v.Name = "other" },
		"title":          func(v *fleet.Tenant) { v.Title = "\x1b[2J" },
		`label key "-x"`: func(v *fleet.Tenant) { v.Labels = map[string]string{"-x": ""} },
		"revision":       func(v *fleet.Tenant) { v.Revision = -1 },
	})
	refused(t, func() fleet.Site { return fleet.Site{Meta: goodMeta()} }, map[string]func(*fleet.Site){
		"pool":     func(v *fleet.Site) { v.Name = "pool" },
		"tenant":   func(v *fleet.Site) { v.Tenant = "A" },
		"together": func(v *fleet.Site) { v.Spec.Stack = "x" },
		"counts":   func(v *fleet.Site) { v.Status.Servers = -1 },
		"location": func(v *fleet.Site) { v.Location = "\xff" },
	})
	refused(t, goodNode, map[string]func(*fleet.Node){
		"does not belong": func(v *fleet.Node) { v.EK[0]++ },
		"node ID":         func(v *fleet.Node) { v.ID = "x" },
		"state 9":         func(v *fleet.Node) { v.State = 9 },
		"pool":            func(v *fleet.Node) { v.Site = "pool" },
		"ldevid_key":      func(v *fleet.Node) { v.LDevIDKey = nil },
		"request ID":      func(v *fleet.Node) { v.Request = "" },
	})
	refused(t, goodImage, map[string]func(*fleet.Image){
		"version":      func(v *fleet.Image) { v.Version = "../x" },
		"kind":         func(v *fleet.Image) { v.Kind = "" },
		"architecture": func(v *fleet.Image) { v.Arch = "x86_64" },
		"size":         func(v *fleet.Image) { v.Size = 0 },
		"pcr11":        func(v *fleet.Image) { v.PCR11 = nil },
		"authenticode": func(v *fleet.Image) { v.Authenticode = digest[1:] },
		"signer_cert":  func(v *fleet.Image) { v.SignerCert = digest[1:] },
		"manifest":     func(v *fleet.Image) { v.Manifest = make([]byte, fleet.MaxManifest+1) },
	})
	refused(t, goodCharter, map[string]func(*fleet.Charter){
		"format":        func(v *fleet.Charter) { v.Format = "muster/order/v1" },
		"issued":        func(v *fleet.Charter) { v.Issued = time.Time{} },
		"servers is 2":  func(v *fleet.Charter) { v.Policy.Servers = 2 },
		"promote_at":    func(v *fleet.Charter) { v.Policy.PromoteAt = 2 },
		"any_boot":      func(v *fleet.Charter) { v.AnyBoot = true },
		"founding mode": func(v *fleet.Charter) { v.Founding.Mode = "" },
		"overlap":       func(v *fleet.Charter) { v.Birth.ServiceCIDR = "10.42.128.0/17" },
		"flannel":       func(v *fleet.Charter) { v.Birth.FlannelBackend = "x" },
		"max_learners":  func(v *fleet.Charter) { v.Birth.MaxLearners = 3 },
		"no image":      func(v *fleet.Charter) { v.Images = nil },
		"delegate 0":    func(v *fleet.Charter) { v.Delegates = [][]byte{nil} },
		"escrow_key":    func(v *fleet.Charter) { v.EscrowKey = digest[1:] },
		"node_cidr":     func(v *fleet.Charter) { v.Birth.NodeCIDR = "fd00::/64" },
		"cluster_cidr":  func(v *fleet.Charter) { v.Birth.NodeCIDR = "10.42.0.0/16" },
	})
	refused(t, goodOrder, map[string]func(*fleet.Order){
		"not_after":     func(v *fleet.Order) { v.NotAfter = v.Issued },
		"kind":          func(v *fleet.Order) { v.Kind = "explode" },
		"a disk":        func(v *fleet.Order) { v.Disk = nil },
		"an image":      func(v *fleet.Order) { v.Image = nil },
		"a snapshot":    func(v *fleet.Order) { v.Snapshot = "x" },
		"a digest":      func(v *fleet.Order) { v.Digest = digest },
		"serial nor":    func(v *fleet.Order) { v.Disk = &fleet.DiskTarget{SizeBytes: 1} },
		"site":          func(v *fleet.Order) { v.Site = "pool" },
		"size of the d": func(v *fleet.Order) { v.Disk = &fleet.DiskTarget{Serial: "S"} },
		"a cluster bel": func(v *fleet.Order) { v.Cluster = "c-1" },
		"an epoch":      func(v *fleet.Order) { v.Epoch = 1 },
		"into":          func(v *fleet.Order) { v.Into = "c-2" },
	})
	clusterOrder := func(kind fleet.OrderKind, change func(*fleet.Order)) func() fleet.Order {
		return func() fleet.Order {
			o := goodOrder()
			o.Kind, o.Disk, o.Image = kind, nil, nil
			change(&o)
			return o
		}
	}
	refused(t, clusterOrder(fleet.OrderFound, func(*fleet.Order) {}), map[string]func(*fleet.Order){
		"a cluster bel": func(v *fleet.Order) { v.Cluster = "c-1" },
		"an epoch":      func(v *fleet.Order) { v.Epoch = 2 },
	})
	refused(t, clusterOrder(fleet.OrderReset, func(o *fleet.Order) { o.Cluster, o.Epoch = "c-1", 2 }), map[string]func(*fleet.Order){
		"a cluster bel": func(v *fleet.Order) { v.Cluster = "" },
		"an epoch":      func(v *fleet.Order) { v.Epoch = 0 },
		"at most":       func(v *fleet.Order) { v.Epoch = 1 << 63 },
	})
	refused(t, clusterOrder(fleet.OrderRestore, func(o *fleet.Order) { o.Cluster, o.Epoch, o.Snapshot = "c-1", 2, "e-1" }), map[string]func(*fleet.Order){
		"cluster UID": func(v *fleet.Order) { v.Cluster = "-" },
		"a snapshot":  func(v *fleet.Order) { v.Snapshot = "" },
	})
	refused(t, clusterOrder(fleet.OrderDissolve, func(o *fleet.Order) { o.Cluster, o.Into = "c-1", "c-2" }), map[string]func(*fleet.Order){
		"into itself": func(v *fleet.Order) { v.Into = v.Cluster },
		"into belo":   func(v *fleet.Order) { v.Into = "" },
		"cluster UID": func(v *fleet.Order) { v.Into, v.Cluster = "a b", "c/d" },
	})
	refused(t, goodRecord, map[string]func(*fleet.ClusterRecord){
		"tenant":      func(v *fleet.ClusterRecord) { v.Tenant = "" },
		"pool":        func(v *fleet.ClusterRecord) { v.Site = "pool" },
		"cluster UID": func(v *fleet.ClusterRecord) { v.UID = "" },
		"epoch":       func(v *fleet.ClusterRecord) { v.Epoch = 1 << 63 },
		"node ID":     func(v *fleet.ClusterRecord) { v.Founder = "x" },
		"sorted":      func(v *fleet.ClusterRecord) { v.Servers = []fleet.NodeID{"n-b", "n-a"} },
		"twice":       func(v *fleet.ClusterRecord) { v.Servers = []fleet.NodeID{ek.NodeID(), ek.NodeID()} },
		"servers, at": func(v *fleet.ClusterRecord) { v.Servers = make([]fleet.NodeID, 17) },
		"into itself": func(v *fleet.ClusterRecord) { v.Into = v.UID },
	})
	refused(t, func() fleet.EscrowOffer {
		return fleet.EscrowOffer{Format: fleet.EscrowOfferFormat, Tenant: "default", Site: "shop-1", Node: ek.NodeID(), Key: digest, Issued: now}
	}, map[string]func(*fleet.EscrowOffer){
		"format": func(v *fleet.EscrowOffer) { v.Format = fleet.OrderFormat },
		"key":    func(v *fleet.EscrowOffer) { v.Key = digest[1:] },
		"issued": func(v *fleet.EscrowOffer) { v.Issued = time.Time{} },
	})
	refused(t, goodAdmission, map[string]func(*fleet.Admission){
		"incarnation": func(v *fleet.Admission) { v.Incarnation = 0 },
		"ldevid_key":  func(v *fleet.Admission) { v.LDevIDKey = nil },
		"address":     func(v *fleet.Admission) { v.Address = "::1" },
		"value":       func(v *fleet.Admission) { v.Labels = map[string]string{"a": "b c"} },
	})
	refused(t, func() fleet.Removal {
		a := goodAdmission()
		return fleet.Removal{Format: fleet.RemovalFormat, Tenant: a.Tenant, Site: a.Site, Node: a.Node, Incarnation: 1, LDevIDKey: digest, Issued: now}
	}, map[string]func(*fleet.Removal){
		"format":      func(v *fleet.Removal) { v.Format = fleet.AdmissionFormat },
		"incarnation": func(v *fleet.Removal) { v.Incarnation = 0 },
	})
	refused(t, goodStackVersion, map[string]func(*fleet.StackVersion){
		"images":     func(v *fleet.StackVersion) { v.Images = nil },
		"etcd minor": func(v *fleet.StackVersion) { v.EtcdMinor = "3" },
		"twice": func(v *fleet.StackVersion) {
			v.AddOns = []fleet.AddOn{{Name: "a", Version: "1", SHA256: digest}, {Name: "a", Version: "1", SHA256: digest}}
		},
		"created": func(v *fleet.StackVersion) { v.Created = time.Time{} },
		"app \"a\"": func(v *fleet.StackVersion) {
			v.AddOns = []fleet.AddOn{{Name: "a", Version: "1", SHA256: digest}}
			v.Apps = []fleet.App{{AddOn: v.AddOns[0]}}
		},
		"namespace": func(v *fleet.StackVersion) {
			v.AddOns = []fleet.AddOn{{Name: "a", Version: "1", SHA256: digest, Namespace: "A b"}}
		},
		"values": func(v *fleet.StackVersion) {
			v.AddOns = []fleet.AddOn{{Name: "a", Version: "1", SHA256: digest, Values: strings.Repeat("x", fleet.MaxValues+1)}}
		},
		"label": func(v *fleet.StackVersion) {
			v.Apps = []fleet.App{{AddOn: fleet.AddOn{Name: "a", Version: "1", SHA256: digest}, Sites: map[string]string{"a b": ""}}}
		},
		"cni": func(v *fleet.StackVersion) { v.CNI = "No Name" },
	})
	refused(t, func() fleet.Charter {
		c := goodCharter()
		c.Stack, c.Update = goodStackRef(), goodUpdate()
		return c
	}, map[string]func(*fleet.Charter){
		"sha256 of the stack version": func(v *fleet.Charter) { v.Stack.SHA256 = digest[1:] },
		"stack":                       func(v *fleet.Charter) { v.Stack.Name = "" },
		"version":                     func(v *fleet.Charter) { v.Stack.Version = "../x" },
		"HH:MM":                       func(v *fleet.Charter) { v.Update.Windows[0].From = "3:00" },
		"minutes":                     func(v *fleet.Charter) { v.Update.Windows[0].Minutes = 0 },
		"day \"someday\"":             func(v *fleet.Charter) { v.Update.Windows[0].Days = []string{"someday"} },
		"utc_offset_min":              func(v *fleet.Charter) { v.Update.Windows[0].UTCOffset = 5000 },
		"drain_timeout_s":             func(v *fleet.Charter) { v.Update.DrainTimeout = -1 },
		"rate_kbit_s":                 func(v *fleet.Charter) { v.Update.RateKbit = -1 },
		"update windows":              func(v *fleet.Charter) { v.Update.Windows = make([]fleet.UpdateWindow, 1000) },
	})
	refused(t, goodSystem, map[string]func(*fleet.SystemReport){
		"slot":              func(v *fleet.SystemReport) { v.Slot = "c" },
		"state":             func(v *fleet.SystemReport) { v.State = 99 },
		"percent":           func(v *fleet.SystemReport) { v.Percent = 101 },
		"image_sha256":      func(v *fleet.SystemReport) { v.ImageSHA256 = digest[1:] },
		"reason":            func(v *fleet.SystemReport) { v.Reason = "\x1b[2J" },
		"failed images":     func(v *fleet.SystemReport) { v.Failed = make([]fleet.FailedImage, 1000) },
		"of failed image 0": func(v *fleet.SystemReport) { v.Failed = []fleet.FailedImage{{}} },
		"warnings":          func(v *fleet.SystemReport) { v.Warnings = make([]string, 1000) },
		"stack":             func(v *fleet.SystemReport) { v.Stack = &fleet.StackRef{} },
	})
	refused(t, func() fleet.SiteSettings {
		s := fleet.DefaultSettings()
		s.Install = &fleet.DiskRule{Prefer: fleet.DiskNVMeFirst, MinBytes: 1, MaxBytes: 2}
		return s
	}, map[string]func(*fleet.SiteSettings){
		"prefer":    func(v *fleet.SiteSettings) { v.Install.Prefer = "any" },
		"max_bytes": func(v *fleet.SiteSettings) { v.Install.MinBytes = 3 },
		"sizes":     func(v *fleet.SiteSettings) { v.Install.MinBytes = -3 },
	})
	refused(t, goodRule, map[string]func(*fleet.PreApproval){
		"identity":  func(v *fleet.PreApproval) { v.MinIdentity = fleet.IdentityUnverified },
		"boot":      func(v *fleet.PreApproval) { v.MinBoot = fleet.BootUnknown },
		"limit":     func(v *fleet.PreApproval) { v.Limit = 0 },
		"not_after": func(v *fleet.PreApproval) { v.NotAfter = time.Time{} },
		"EKs":       func(v *fleet.PreApproval) { v.EKs = []fleet.ListedEK{{EK: ek}} },
		"a day":     func(v *fleet.PreApproval) { v.PerDay = 2 },
		"serial":    func(v *fleet.PreApproval) { v.Serials = []string{""} },
	})
	refused(t, goodClaim, map[string]func(*fleet.PreApproval){
		"one machine": func(v *fleet.PreApproval) { v.Limit = 2 },
		"a site":      func(v *fleet.PreApproval) { v.Site = "" },
		"claim_hash":  func(v *fleet.PreApproval) { v.ClaimHash = nil },
		"vendor":      func(v *fleet.PreApproval) { v.Vendor = "ACME" },
	})
	refused(t, goodEvent, map[string]func(*fleet.Event){
		"kind":    func(v *fleet.Event) { v.Kind = "Served!" },
		"level":   func(v *fleet.Event) { v.Level = 9 },
		"time":    func(v *fleet.Event) { v.Time = time.Time{} },
		"node ID": func(v *fleet.Event) { v.Node = "x" },
		"text":    func(v *fleet.Event) { v.Text = "\x1b[2J" },
	})
}

func TestHugeListsCostLittle(t *testing.T) {
	c := goodCharter()
	c.Images = make([]fleet.ImageEvidence, 1<<20)
	if err := c.Validate(); err == nil || len(err.Error()) > 64<<10 {
		t.Error("the error is missing or as long as the list")
	}
	a := goodRule()
	a.Kind, a.EKs = fleet.PreApproveEKs, make([]fleet.ListedEK, 1<<20)
	if err := a.Validate(); err == nil || len(err.Error()) > 64<<10 {
		t.Error("the error is missing or as long as the list")
	}
}

func TestPreApprovalEnds(t *testing.T) {
	a := goodRule()
	for name, row := range map[string]struct {
		change func(*fleet.PreApproval)
		want   bool
	}{
		"fresh":     {func(a *fleet.PreApproval) {}, true},
		"used up":   {func(a *fleet.PreApproval) { a.Used = 1 }, false},
		"withdrawn": {func(a *fleet.PreApproval) { a.Withdrawn = true }, false},
		"ended":     {func(a *fleet.PreApproval) { a.NotAfter = now.Add(-time.Minute) }, false},
	} {
		b := a
		b.NotAfter = now
		row.change(&b)
		if got := b.Open(now.Add(-time.Second)); got != row.want {
			t.Errorf("%s: open is %v", name, got)
		}
	}
}

func TestDiskTargetMatchesExactly(t *testing.T) {
	disk := fleet.Disk{Path: "/dev/sda", Serial: "S1", WWN: "W1", Model: "M", SizeBytes: 100}
	good := fleet.DiskTarget{Serial: "S1", WWN: "W1", Model: "M", SizeBytes: 100}
	if !good.Matches(disk) {
		t.Error("the target does not match its own disk")
	}
	for name, change := range map[string]func(*fleet.DiskTarget){
		"serial": func(d *fleet.DiskTarget) { d.Serial = "S2" },
		"case":   func(d *fleet.DiskTarget) { d.Serial = "s1" },
		"WWN":    func(d *fleet.DiskTarget) { d.WWN = "" },
		"model":  func(d *fleet.DiskTarget) { d.Model = "" },
		"size":   func(d *fleet.DiskTarget) { d.SizeBytes++ },
	} {
		d := good
		change(&d)
		if d.Matches(disk) {
			t.Errorf("a target with another %s matches", name)
		}
	}
	if (fleet.DiskTarget{Model: "M", SizeBytes: 100}).Matches(fleet.Disk{Model: "M", SizeBytes: 100}) {
		t.Error("a disk without serial and WWN matches")
	}
}

func FuzzUnmarshalDocuments(f *testing.F) {
	for _, v := range []any{goodCharter(), goodOrder(), goodAdmission(), goodStackVersion()} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var c fleet.Charter
		if json.Unmarshal(b, &c) == nil {
			_ = c.Validate()
		}
		var o fleet.Order
		if json.Unmarshal(b, &o) == nil {
			_ = o.Validate()
		}
		var a fleet.Admission
		if json.Unmarshal(b, &a) == nil {
			_ = a.Validate()
		}
		var v fleet.StackVersion
		if json.Unmarshal(b, &v) == nil {
			_ = v.Validate()
		}
	})
}
