package central

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

// crashWork says what the centre that is killed shall do.
const (
	crashWork    = "MUSTER_TEST_CRASH_WORK"
	preApproving = "pre-approving"
)

// crashingPreApproved imports a list with a, makes a claim code for b and a
// rule for two more, and lets a, b, c, d and e call. It prints each step once
// it is acknowledged. A second run goes on where the first was killed.
func crashingPreApproved(h *harness) error {
	end := h.clock.now().Add(time.Hour)
	list := preApprovalOf(testCaller, "list", "shop-7", nil)
	list.NotAfter = end
	claim := preApprovalOf(testCaller, "claim", "shop-7", nil)
	claim.Kind, claim.ClaimHash, claim.Limit, claim.NotAfter = fleet.PreApproveClaim, crashClaim.hash, 1, end
	rule := preApprovalOf(testCaller, "rule", "shop-7", nil)
	rule.Kind, rule.MinIdentity, rule.MinBoot, rule.Limit, rule.NotAfter = fleet.PreApproveRule, fleet.IdentityHardware, fleet.BootMeasured, 2, end
	there := func(name string) bool {
		return h.store.View(context.Background(), func(t store.Reader) error {
			_, err := t.PreApproval(DefaultTenant, name)
			return err
		}) == nil
	}
	if !there("list") {
		if _, err := h.s.importList(context.Background(), testCaller, listImport{PreApproval: list, csv: []byte(listOf("a"))}); err != nil {
			return err
		}
	}
	for _, p := range []fleet.PreApproval{claim, rule} {
		if !there(p.Name) {
			if _, err := h.s.createPreApproval(context.Background(), testCaller, p, ""); err != nil {
				return err
			}
		}
	}
	fmt.Println("ready")
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		f := servicetest.Filing(name)
		if name == "b" {
			f.Claim = crashClaim.code
		}
		r, err := h.File(context.Background(), f)
		if err != nil {
			return err
		}
		fmt.Println("filed", name, r.State)
	}
	return nil
}

// crashClaim is a fixed code, so that both runs know it.
var crashClaim = func() (c struct {
	code string
	hash fleet.HexBytes
}) {
	c.code, c.hash = fixedClaim("crash")
	return c
}()

// TestKilledWhilePreApproving kills the centre around each pre-approval: the
// approval, its record and its use are all there or none is.
func TestKilledWhilePreApproving(t *testing.T) {
	binary := crashtest.Binary(t)
	t.Setenv(crashWork, preApproving)
	done := []string{"ready", "filed a approved", "filed b approved", "filed c approved", "filed d approved", "filed e pending"}
	for _, point := range []string{
		"preapprove.import.before-commit,1", "preapprove.before-commit,1", "preapprove.before-commit,2", "preapprove.before-commit,4",
		"preapprove.after-commit,1", "preapprove.after-commit,2", "preapprove.after-commit,4", "file.before-commit,5", "file.after-commit,5",
	} {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			before, killed := runCrashing(t, binary, dir, point)
			if !killed || !slices.Equal(before, done[:min(len(before), len(done))]) {
				t.Fatalf("killed is %v after %v", killed, before)
			}
			lookPreApproved(t, dir, before)
			after, killed := runCrashing(t, binary, dir, "")
			if killed || !slices.Equal(after, done) {
				t.Fatalf("the second run said %v", after)
			}
			if uses := lookPreApproved(t, dir, after); uses != 4 {
				t.Errorf("%d uses at the end", uses)
			}
		})
	}
}

// lookPreApproved checks that approvals, records, uses and lines agree, and
// that what was acknowledged is there.
func lookPreApproved(t *testing.T, dir string, said []string) (uses int) {
	t.Helper()
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	h.sound(t)
	approved, recorded := map[string]int{}, map[string]int{}
	state := map[string]fleet.RequestState{}
	for _, r := range must(h.Requests())(t) {
		state[strings.TrimPrefix(r.Evidence.Serial, "S-")] = r.State
		if r.State == fleet.RequestApproved {
			approved[r.DecidedBy]++
		}
	}
	for _, r := range must(h.records())(t) {
		if r.Kind == audit.RequestPreApproved {
			recorded[r.Actor]++
		}
	}
	err = h.store.View(context.Background(), func(tx store.Reader) error {
		all, err := tx.PreApprovals(DefaultTenant)
		if err != nil {
			return err
		}
		for _, p := range all {
			actor := "preapproval:" + p.Name
			n, err := tx.CountUses(DefaultTenant, p.Name, time.Time{})
			if err != nil {
				return err
			}
			if n != p.Used || n != approved[actor] || n != recorded[actor] || n > p.Limit {
				t.Errorf("%s: %d uses, counted %d, %d approvals, %d records", p.Name, n, p.Used, approved[actor], recorded[actor])
			}
			uses += n
		}
		lines, err := tx.LinesOfEK(DefaultTenant, servicetest.Filing("a").Evidence.EK)
		if len(lines) == 1 && (lines[0].Request != "") != (state["a"] == fleet.RequestApproved) {
			t.Errorf("the line was used for %q, and the request is %s", lines[0].Request, state["a"])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range said {
		var verb, name, was string
		if n, _ := fmt.Sscan(line, &verb, &name, &was); n == 3 && state[name].String() != was {
			t.Errorf("%q was acknowledged, and the request is %s", line, state[name])
		}
	}
	return uses
}
