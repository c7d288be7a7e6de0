package central

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/drift"
)

// yard is a shop with a release key and slot images whose files are here.
type yard struct {
	*shop
	key *release
}

func newYard(t *testing.T, images ...string) *yard {
	t.Helper()
	y := &yard{newShop(t), newRelease(t)}
	y.update(func(tx store.Tx) error {
		_, _, err := trustReleaseKeys(tx, act{actor: "system", now: y.clock.now()}, DefaultTenant, y.key.pem, "test")
		return err
	})
	for _, version := range images {
		y.push(version)
	}
	return y
}

// push makes an image known and its files present, as an upload does.
func (y *yard) push(version string) {
	y.t.Helper()
	_, envelope, files := y.key.slot("system", version)
	y.update(func(tx store.Tx) error {
		for _, f := range files {
			sum := sha256.Sum256(f)
			if err := tx.AddBlob(store.Blob{Tenant: DefaultTenant, SHA256: sum[:], Size: int64(len(f)), Stored: y.clock.now(), By: "test"}); err != nil {
				return err
			}
		}
		_, _, err := addImage(tx, act{actor: "system", now: y.clock.now()}, DefaultTenant, envelope)
		return err
	})
}

// version signs a stack version over an image.
func (y *yard) version(key *release, version string, change func(*fleet.StackVersion)) []byte {
	y.t.Helper()
	ref, _, _ := y.key.slot("system", version)
	v := fleet.StackVersion{
		Format: fleet.StackVersionFormat, Tenant: DefaultTenant, Stack: "shop", Version: version, Images: []fleet.ImageRef{ref},
		K3s: "v1.36.3+k3s1", EtcdMinor: "3.6", Created: y.clock.now().UTC(),
	}
	if change != nil {
		change(&v)
	}
	payload, err := json.Marshal(v)
	y.must(err)
	return key.sign(fleet.StackVersionPayload, payload)
}

func (y *yard) publish(envelope []byte) error {
	_, _, _, err := y.s.publish(context.Background(), testCaller, envelope, "test")
	return err
}

func (y *yard) assign(site, version string, change func(*stackAssignment)) ([]assignedSite, error) {
	q := stackAssignment{sites: []string{site}, stack: "shop", version: version, reason: "test"}
	if change != nil {
		change(&q)
	}
	out, _, err := y.s.assignStack(context.Background(), testCaller, q)
	return out, err
}

func (y *yard) charter(site string) (c *fleet.Charter) {
	y.t.Helper()
	y.must(y.s.store.View(context.Background(), func(t store.Reader) (err error) {
		c, _, err = charterNow(t, DefaultTenant, site)
		return err
	}))
	return c
}

func (y *yard) drift(site string) (r drift.Result) {
	y.t.Helper()
	y.must(y.s.store.View(context.Background(), func(t store.Reader) (err error) {
		v, err := t.Site(DefaultTenant, site)
		if err == nil {
			r, err = y.s.driftOf(t, v, map[string][]fleet.ImageRef{})
		}
		return err
	}))
	return r
}

func (y *yard) says(m *member, q *musterv1.SystemReport) {
	y.t.Helper()
	_, err := y.node.Report(m.ctx, &musterv1.ReportRequest{System: q})
	y.must(err)
}

// TestFromAVersionToDrift is the second walk at the centre: published,
// assigned, in the charter, reported, compared.
func TestFromAVersionToDrift(t *testing.T) {
	y := newYard(t, "1", "2")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.must(y.publish(y.version(y.key, "2", nil)))
	if r := y.drift("shop-7"); r.State != drift.Unassigned {
		t.Errorf("before: %+v", r)
	}
	if out, err := y.assign("shop-7", "1", func(q *stackAssignment) { q.dry = true }); err != nil || !out[0].changed || y.charter("shop-7").Stack != nil {
		t.Errorf("a dry run: %+v, %v", out, err)
	}
	before := y.charter("shop-7").Version
	out, err := y.assign("shop-7", "1", nil)
	if err != nil || !out[0].changed {
		t.Fatalf("%+v, %v", out, err)
	}
	charter := y.charter("shop-7")
	if charter.Stack == nil || charter.Stack.ID() != "shop@1" || charter.Version.Compare(before) <= 0 {
		t.Fatalf("the charter says %+v in version %s", charter.Stack, charter.Version)
	}
	if out, err := y.assign("shop-7", "1", nil); err != nil || out[0].changed || y.charter("shop-7").Version != charter.Version {
		t.Errorf("once more: %+v, %v", out, err)
	}
	if r := y.drift("shop-7"); r.State != drift.Unknown {
		t.Errorf("a node that says nothing: %+v", r)
	}
	ref, _, _ := y.key.slot("system", "1")
	system := &musterv1.SystemReport{
		Slot: "a", Image: "system@1", ImageSha256: ref.SHA256, State: musterv1.SystemState_SYSTEM_STATE_CURRENT,
		Stack: &musterv1.StackRef{Name: "shop", Version: "1", Sha256: charter.Stack.SHA256},
	}
	y.says(a, system)
	if r := y.drift("shop-7"); r.State != drift.Current || r.Current != 1 {
		t.Errorf("when it says so: %+v", r)
	}
	if _, err := y.assign("shop-7", "2", nil); err != nil {
		t.Fatal(err)
	}
	if r := y.drift("shop-7"); r.State != drift.Updating || !strings.Contains(r.Why, "system@1") {
		t.Errorf("with the next version: %+v", r)
	}
	next, _, _ := y.key.slot("system", "2")
	system.State, system.Percent, system.Target, system.TargetSha256 = musterv1.SystemState_SYSTEM_STATE_WRITING, 40, "system@2", next.SHA256
	y.says(a, system)
	if r := y.drift("shop-7"); r.State != drift.Updating || !strings.Contains(r.Why, "writing, 40 %") {
		t.Errorf("while it writes: %+v", r)
	}
	system.State, system.Reason, system.Failed = musterv1.SystemState_SYSTEM_STATE_ROLLED_BACK, "k3s never became ready", []*musterv1.FailedImage{{Sha256: next.SHA256, Reason: "k3s never became ready"}}
	y.says(a, system)
	if r := y.drift("shop-7"); r.State != drift.Blocked || !strings.Contains(r.Why, "clear-failed") {
		t.Errorf("after a rollback: %+v", r)
	}
	if e := y.events("system.rolled-back"); len(e) != 1 || e[0].Level != fleet.EventAlarm {
		t.Errorf("%d alarms of the rollback", len(e))
	}
	y.clock.set(y.clock.now().Add(time.Hour))
	if r := y.drift("shop-7"); !r.Stale || !strings.Contains(r.Why, "last heard of") {
		t.Errorf("an hour later: %+v", r)
	}
	if n := y.audited(audit.StackVersionAdded); n != 2 {
		t.Errorf("%d records of versions", n)
	}
	y.sound(t)
}

func TestVersionsThatAreRefused(t *testing.T) {
	y := newYard(t, "1")
	stranger := newRelease(t)
	payload := func(change func(*fleet.StackVersion)) []byte { return y.version(y.key, "1", change) }
	for name, row := range map[string]struct {
		envelope []byte
		why      string
	}{
		"no envelope":        {[]byte("{}"), "no signed stack version"},
		"unsigned":           {[]byte(`{"payloadType":"` + fleet.StackVersionPayload + `","payload":"e30=","signatures":[]}`), "sign"},
		"a foreign key":      {y.version(stranger, "1", nil), "no release key"},
		"another tenant":     {payload(func(v *fleet.StackVersion) { v.Tenant = "other" }), "is of tenant other"},
		"another kind":       {y.key.sign(fleet.CharterPayload, []byte(`{}`)), "signed"},
		"an unknown field":   {y.key.sign(fleet.StackVersionPayload, []byte(`{"formats":1}`)), "not understood"},
		"no images":          {payload(func(v *fleet.StackVersion) { v.Images = nil }), "images"},
		"more than one JSON": {y.key.sign(fleet.StackVersionPayload, []byte(`{}{}`)), "after its end"},
	} {
		if err := y.publish(row.envelope); err == nil || !strings.Contains(err.Error(), row.why) {
			t.Errorf("%s: %v, want %q", name, err, row.why)
		}
	}
	if n := y.audited(audit.StackVersionAdded); n != 0 {
		t.Errorf("%d versions were published", n)
	}
	y.must(y.publish(y.version(y.key, "1", nil)))
	// Signed again, the same words are the same version.
	y.must(y.publish(y.version(y.key, "1", nil)))
	if err := y.publish(payload(func(v *fleet.StackVersion) { v.CNI = "flannel" })); err == nil || !strings.Contains(err.Error(), "never changes") {
		t.Errorf("a changed version: %v", err)
	}
	if n := y.audited(audit.StackVersionAdded); n != 1 {
		t.Errorf("%d versions were published", n)
	}
}

func TestAssignmentsThatAreRefused(t *testing.T) {
	y := newYard(t, "1", "2")
	y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.must(y.publish(y.version(y.key, "2", func(v *fleet.StackVersion) { v.EtcdMinor = "3.10" })))
	y.must(y.publish(y.version(y.key, "3", nil))) // its image was never pushed
	if _, err := y.assign("shop-7", "3", nil); err == nil || !strings.Contains(err.Error(), "muster image push") {
		t.Errorf("without its image: %v", err)
	}
	if _, err := y.assign("shop-7", "4", nil); err == nil || !strings.Contains(err.Error(), "no stack version") {
		t.Errorf("no such version: %v", err)
	}
	if _, err := y.assign("nowhere", "1", nil); err == nil {
		t.Error("no such site")
	}
	if _, err := y.assign("", "1", func(q *stackAssignment) { q.sites, q.labels = nil, map[string]string{"canary": "yes"} }); err == nil || !strings.Contains(err.Error(), "no site has these labels") {
		t.Errorf("no such labels: %v", err)
	}
	if _, err := y.assign("shop-7", "1", func(q *stackAssignment) { q.generation = 99 }); err == nil {
		t.Error("another generation")
	}
	if _, err := y.assign("shop-7", "1", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := y.assign("shop-7", "2", nil); err == nil || !strings.Contains(err.Error(), "point of no return") {
		t.Errorf("a step of etcd: %v", err)
	}
	if _, err := y.assign("shop-7", "2", func(q *stackAssignment) { q.noReturn = true }); err != nil {
		t.Errorf("accepted: %v", err)
	}
	if _, err := y.assign("shop-7", "1", func(q *stackAssignment) { q.noReturn = true }); err == nil || !strings.Contains(err.Error(), "etcd does not go back") {
		t.Errorf("back: %v", err)
	}
	if _, err := y.set("shop-7", func(s *fleet.SiteSettings) { s.Images = []string{"system@2"} }); err != nil {
		t.Fatal(err)
	}
	if _, err := y.assign("shop-7", "", func(q *stackAssignment) { q.stack = "" }); err != nil || y.charter("shop-7").Stack != nil {
		t.Errorf("taken back: %v, %+v", err, y.charter("shop-7").Stack)
	}
	if _, err := y.assign("shop-7", "1", nil); err == nil || !strings.Contains(err.Error(), "allows only system@2") {
		t.Errorf("an image that the site does not allow: %v", err)
	}
}

func (y *yard) disks(m *member, disks ...fleet.Disk) {
	y.t.Helper()
	y.update(func(tx store.Tx) error {
		n, err := tx.Node(DefaultTenant, m.ID)
		if err != nil {
			return err
		}
		n.Hardware.Disks = disks
		_, err = tx.PutNode(n)
		return err
	})
}

func TestOrdersForSystems(t *testing.T) {
	y := newYard(t, "1")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	first := fleet.Disk{Path: "/dev/sda", Model: "M", Serial: "S1", WWN: "naa.1", SizeBytes: 1 << 36}
	second := fleet.Disk{Path: "/dev/sdb", Model: "M", Serial: "S1", WWN: "naa.2", SizeBytes: 1 << 36}
	y.disks(a, first, second)
	id := string(a.ID)
	give := func(w wish) (promise, error) {
		w.node, w.reason = id, "test"
		return y.s.order(context.Background(), testCaller, w)
	}
	for name, row := range map[string]struct {
		w   wish
		why string
	}{
		"two candidates":         {wish{kind: fleet.OrderInstall, disk: "serial=S1", image: "system@1"}, "/dev/sdb"},
		"no disk, no rule":       {wish{kind: fleet.OrderInstall, image: "system@1"}, "no rule"},
		"no image, no stack":     {wish{kind: fleet.OrderInstall, disk: "wwn=naa.1"}, "has no stack"},
		"no such image":          {wish{kind: fleet.OrderInstall, disk: "wwn=naa.1", image: "system@9"}, "no image"},
		"an image without files": {wish{kind: fleet.OrderInstall, disk: "wwn=naa.1", image: "slot@1"}, "manifest"},
		"another site":           {wish{kind: fleet.OrderRecover, site: "shop-8"}, "shop-8"},
		"no such kind":           {wish{kind: "explode"}, "no orders of kind"},
	} {
		if p, err := give(row.w); err == nil || !strings.Contains(err.Error(), row.why) {
			t.Errorf("%s: %+v, %v; want %q", name, p.order, err, row.why)
		}
	}
	dry, err := give(wish{kind: fleet.OrderInstall, disk: "/dev/sda", image: "system@1", dry: true})
	if err != nil || dry.order.Disk.WWN != "naa.1" || len(y.pull(a).orders) != 0 {
		t.Fatalf("a dry run: %+v, %v", dry, err)
	}
	p, err := give(wish{kind: fleet.OrderInstall, disk: "wwn=naa.1", image: "system@1", keepData: true})
	if err != nil || *p.order.Disk != (fleet.DiskTarget{Serial: "S1", WWN: "naa.1", Model: "M", SizeBytes: 1 << 36}) || !p.order.KeepData || p.order.Image.ID() != "system@1" {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, err := give(wish{kind: fleet.OrderInstall, disk: "wwn=naa.2", image: "system@1"}); err == nil || !strings.Contains(err.Error(), "stands already") {
		t.Errorf("a second one: %v", err)
	}
	// The node has it, and says how it went.
	if got := y.pull(a).orders; len(got) != 1 || got[p.order.ID].Disk == nil {
		t.Fatalf("the node was given %+v", got)
	}
	for _, state := range []musterv1.OrderState{musterv1.OrderState_ORDER_STATE_RUNNING, musterv1.OrderState_ORDER_STATE_DONE} {
		_, err := y.node.Report(a.ctx, &musterv1.ReportRequest{Outcomes: []*musterv1.OrderOutcome{{Id: p.order.ID, State: state, Text: "slot a is written"}}})
		y.must(err)
	}
	if n := y.audited(audit.OrderFinished); n != 1 {
		t.Errorf("%d records of its end", n)
	}
	for _, w := range []wish{
		{kind: fleet.OrderWipe, disk: "wwn=naa.2"}, {kind: fleet.OrderRecover}, {kind: fleet.OrderDowngrade, image: "system@1"},
		{kind: fleet.OrderClearFailed, image: "system@1"},
	} {
		if p, err := give(w); err != nil || p.sentence == "" {
			t.Errorf("%s: %+v, %v", w.kind, p, err)
		}
	}
}

// TestInstallByRule: a node that runs recovery at a site with a stack and a
// rule is told to install, once, on exactly one disk.
func TestInstallByRule(t *testing.T) {
	y := newYard(t, "1")
	a := y.join("a", "shop-7")
	y.must(y.publish(y.version(y.key, "1", nil)))
	recovery := &musterv1.SystemReport{Slot: "recovery", Image: "recovery@1", State: musterv1.SystemState_SYSTEM_STATE_RECOVERY}
	y.says(a, recovery)
	orders := func() []fleet.Order { return slices.Collect(maps.Values(y.pull(a).orders)) }
	if n := len(orders()); n != 0 {
		t.Fatalf("%d orders without a rule", n)
	}
	if _, err := y.assign("shop-7", "1", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := y.set("shop-7", func(s *fleet.SiteSettings) { s.Install = &fleet.DiskRule{Prefer: fleet.DiskOnly} }); err != nil {
		t.Fatal(err)
	}
	y.s.installs(context.Background(), DefaultTenant, "shop-7")
	if n, e := len(orders()), y.events("install.waits"); n != 0 || len(e) != 1 {
		t.Fatalf("a machine without a disk: %d orders, %d events", n, len(e))
	}
	y.disks(a, fleet.Disk{Path: "/dev/sda", Serial: "S1", SizeBytes: 1 << 36})
	recovery.Reason = "it looks again"
	y.says(a, recovery)
	got := orders()
	if len(got) != 1 || got[0].Kind != fleet.OrderInstall || got[0].Disk.Serial != "S1" || got[0].Image.ID() != "system@1" {
		t.Fatalf("%+v", got)
	}
	recovery.Reason = "and again"
	y.says(a, recovery)
	if n := len(orders()); n != 1 {
		t.Errorf("%d orders after the next report", n)
	}
	if _, err := y.s.withdraw(context.Background(), testCaller, got[0].ID, "no"); err != nil {
		t.Fatal(err)
	}
	recovery.Reason = "once more"
	y.says(a, recovery)
	if n := len(orders()); n != 0 {
		t.Errorf("what a person withdrew was ordered again: %d", n)
	}
}

func TestHostileSystemReports(t *testing.T) {
	y := newYard(t)
	a := y.join("a", "shop-7")
	for name, q := range map[string]*musterv1.SystemReport{
		"slot":    {Slot: "c"},
		"state":   {State: 99},
		"percent": {Percent: 1 << 31},
		"digest":  {ImageSha256: []byte{1}},
		"failed":  {Failed: make([]*musterv1.FailedImage, 1000)},
		"stack":   {Stack: &musterv1.StackRef{Name: "../x", Version: "1"}},
	} {
		if _, err := y.node.Report(a.ctx, &musterv1.ReportRequest{System: q}); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	y.says(a, &musterv1.SystemReport{State: musterv1.SystemState_SYSTEM_STATE_FAILED, Reason: "\x1b[2J<script>\u202e" + strings.Repeat("x", 5000), Site: "shop-9", Node: "n-other", Tenant: "other"})
	y.must(y.s.store.View(context.Background(), func(t store.Reader) error {
		r, err := t.System(DefaultTenant, a.ID)
		if err == nil && (r.Site != "shop-7" || r.Node != a.ID || len(r.Reason) > maxSentence || strings.ContainsAny(r.Reason, "\x1b\u202e")) {
			y.t.Errorf("%+v", r)
		}
		return err
	}))
	// Without end it may not write.
	for i := range 200 {
		y.says(a, &musterv1.SystemReport{State: musterv1.SystemState_SYSTEM_STATE_FETCHING, Percent: uint32(i % 100)})
	}
	if n := len(y.events("system.fetching")); n != 1 {
		t.Errorf("%d events of one state", n)
	}
	out, err := y.node.Report(a.ctx, &musterv1.ReportRequest{})
	if err != nil || !out.WantSystem {
		t.Errorf("what was passed over is not asked for: %v, %v", out, err)
	}
}

func TestLabels(t *testing.T) {
	y := newYard(t)
	a := y.join("a", "shop-7")
	m := management{Server: y.s}
	ctx := asTest(context.Background())
	out, err := m.LabelObject(ctx, &musterv1.LabelObjectRequest{Kind: "site", Name: "shop-7", Set: map[string]string{"canary": "yes", "x": "y"}})
	if err != nil || !out.Changed || out.Labels["canary"] != "yes" {
		t.Fatalf("%v, %v", out, err)
	}
	if _, err := m.LabelObject(ctx, &musterv1.LabelObjectRequest{Kind: "site", Name: "shop-7", Remove: []string{"x"}, Revision: out.Revision - 1}); err == nil {
		t.Error("an old revision was changed")
	}
	if out, err = m.LabelObject(ctx, &musterv1.LabelObjectRequest{Kind: "site", Name: "shop-7", Remove: []string{"x"}, Revision: out.Revision}); err != nil || len(out.Labels) != 1 {
		t.Errorf("%v, %v", out, err)
	}
	before := y.site("shop-7").Ledger.Documents
	if _, err := m.LabelObject(ctx, &musterv1.LabelObjectRequest{Kind: "node", Name: string(a.ID), Set: map[string]string{"rack": "2"}}); err != nil {
		t.Fatal(err)
	}
	if y.site("shop-7").Ledger.Documents.Compare(before) <= 0 {
		t.Error("no admission with the new label was given out")
	}
	for name, q := range map[string]*musterv1.LabelObjectRequest{
		"nothing":   {Kind: "site", Name: "shop-7"},
		"no kind":   {Kind: "planet", Name: "x", Remove: []string{"x"}},
		"no site":   {Kind: "site", Name: "none", Remove: []string{"x"}},
		"no stack":  {Kind: "stack", Name: "none", Remove: []string{"x"}},
		"bad label": {Kind: "site", Name: "shop-7", Set: map[string]string{"a b": ""}},
	} {
		if out, err := m.LabelObject(ctx, q); err == nil {
			t.Errorf("%s: %v", name, out)
		}
	}
}

func asTest(ctx context.Context) context.Context {
	return access.NewContext(ctx, testCaller.Principal)
}
