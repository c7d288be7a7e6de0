package central

import (
	"context"
	"strings"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
)

func (y *yard) rollout(name string) *musterv1.Rollout {
	y.t.Helper()
	out, err := management{Server: y.s}.GetRollout(asTest(context.Background()), &musterv1.GetRolloutRequest{Name: name})
	y.must(err)
	return out.Rollout
}

// TestRollout: two sites, one after the other, stopped by a bad image, taken up
// again by a person, and at its end. What is known is only in the store.
func TestRollout(t *testing.T) {
	y := newYard(t, "1", "2")
	a, b := y.join("a", "shop-7"), y.join("b", "shop-8")
	y.must(y.publish(y.version(y.key, "1", nil)))
	y.must(y.publish(y.version(y.key, "2", nil)))
	m, ctx := management{Server: y.s}, asTest(context.Background())
	if _, err := m.LabelObject(ctx, &musterv1.LabelObjectRequest{Kind: "site", Name: "shop-8", Set: map[string]string{"canary": "yes"}}); err != nil {
		t.Fatal(err)
	}
	q := &musterv1.StartRolloutRequest{Name: "may", Stack: "shop", Version: "1", First: map[string]string{"canary": "yes"}, Waves: []*musterv1.RolloutWave{{Sites: 1}, {Percent: 100}}, SoakSeconds: 600}
	step := func() {
		t.Helper()
		y.must(y.s.stepRollouts(context.Background()))
	}
	shall := func(site string) string {
		ref := y.site(site).Spec.StackRef()
		if ref == nil {
			return ""
		}
		return ref.ID()
	}
	q.DryRun = true
	if out, err := m.StartRollout(ctx, q); err != nil || out.Rollout.Sites[0].Name != "shop-8" {
		t.Fatal(out, err)
	}
	if step(); shall("shop-8") != "" {
		t.Error("a dry run gave it out")
	}
	q.DryRun = false
	if _, err := m.StartRollout(ctx, q); err != nil {
		t.Fatal(err)
	}
	again := &musterv1.StartRolloutRequest{Name: "june", Stack: "shop", Version: "2", Waves: q.Waves}
	if _, err := m.StartRollout(ctx, again); err == nil || !strings.Contains(err.Error(), "is in the rollout may") {
		t.Errorf("a second one over the same sites: %v", err)
	}
	if _, err := y.deletes("stack", "shop", nil); err == nil {
		t.Error("its stack was deleted")
	}
	if step(); shall("shop-8") != "shop@1" || shall("shop-7") != "" {
		t.Fatalf("%q, %q", shall("shop-8"), shall("shop-7"))
	}
	system := func(m *member, state musterv1.SystemState, failed bool) {
		ref, _, _ := y.key.slot("system", "1")
		r := &musterv1.SystemReport{Slot: "a", Image: "system@1", ImageSha256: ref.SHA256, State: state}
		if failed {
			r.Image, r.ImageSha256, r.Reason, r.Failed = "system@0", nil, "k3s never became ready", []*musterv1.FailedImage{{Sha256: ref.SHA256, Reason: "k3s never became ready"}}
		}
		y.says(m, r)
	}
	system(b, musterv1.SystemState_SYSTEM_STATE_ROLLED_BACK, true)
	step()
	if r := y.rollout("may"); r.State != "stopped" || !strings.Contains(r.Explanation, "1 sites failed, and at most 0 may: shop-8") || len(y.events("rollout.stopped")) != 1 {
		t.Fatalf("%v", r)
	}
	act := func(what, reason string) error {
		_, err := m.ChangeRollout(ctx, &musterv1.ChangeRolloutRequest{Name: "may", Act: what, Reason: reason})
		return err
	}
	if act("resume", "") == nil || act("explode", "x") == nil || act("pause", "x") == nil {
		t.Error("no reason, no such act, or no such move")
	}
	y.must(act("resume", "a broken machine"))
	system(b, musterv1.SystemState_SYSTEM_STATE_CURRENT, false)
	step()
	y.must(act("pause", "lunch"))
	y.clock.set(y.clock.now().Add(20 * time.Minute))
	y.says(b, &musterv1.SystemReport{})
	if step(); shall("shop-7") != "" {
		t.Error("paused, it went on")
	}
	y.must(act("resume", "after lunch"))
	system(b, musterv1.SystemState_SYSTEM_STATE_CURRENT, false)
	step()
	y.clock.set(y.clock.now().Add(10 * time.Minute))
	if step(); shall("shop-7") != "shop@1" {
		t.Fatalf("after the soak time: %v", y.rollout("may"))
	}
	system(a, musterv1.SystemState_SYSTEM_STATE_CURRENT, false)
	system(b, musterv1.SystemState_SYSTEM_STATE_CURRENT, false)
	step()
	y.clock.set(y.clock.now().Add(10 * time.Minute))
	step()
	if r := y.rollout("may"); r.State != "done" || r.SitesHealthy != 2 {
		t.Errorf("%v", r)
	}
	if act("abort", "x") == nil {
		t.Error("what is done was aborted")
	}
	if y.audited(audit.RolloutStarted) != 1 || y.audited(audit.RolloutMoved) != 3 || y.audited(audit.RolloutResumed) != 2 {
		t.Errorf("%d started, %d moved, %d resumed", y.audited(audit.RolloutStarted), y.audited(audit.RolloutMoved), y.audited(audit.RolloutResumed))
	}
	// Who sees a part of the tenant sees that part; another tenant nothing.
	part := access.Principal{Name: "p", Tenant: DefaultTenant, Bindings: []access.Binding{{Tenant: DefaultTenant, Role: access.Viewer, Sites: mustSelector(t, "muster/site=shop-7")}}}
	out, err := m.GetRollout(access.NewContext(context.Background(), part), &musterv1.GetRolloutRequest{Name: "may"})
	if err != nil || len(out.Rollout.Sites) != 1 || strings.Contains(out.String(), "shop-8") {
		t.Errorf("%v, %v", out, err)
	}
	foreign := access.Principal{Name: "f", Tenant: "other", Bindings: []access.Binding{{Tenant: "other", Role: access.Admin}}}
	if out, err := m.GetRollout(access.NewContext(context.Background(), foreign), &musterv1.GetRolloutRequest{Name: "may"}); err == nil {
		t.Errorf("another tenant sees %v", out)
	}
	for name, q := range map[string]*musterv1.StartRolloutRequest{
		"no waves":   {Name: "x", Stack: "shop", Version: "1"},
		"no version": {Name: "x", Stack: "shop", Version: "9", Waves: q.Waves},
		"no sites":   {Name: "x", Stack: "shop", Version: "1", Waves: q.Waves, Labels: map[string]string{"none": "x"}},
		"bad wave":   {Name: "x", Stack: "shop", Version: "1", Waves: []*musterv1.RolloutWave{{Percent: 1 << 31}}},
		"the name":   {Name: "may", Stack: "shop", Version: "1", Waves: q.Waves},
		"no name":    {Stack: "shop", Version: "1", Waves: q.Waves},
	} {
		if out, err := m.StartRollout(ctx, q); err == nil {
			t.Errorf("%s: %v", name, out)
		}
	}
	y.sound(t)
}
