package enroll

import (
	"fmt"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
)

func TestExplainPutsWhatFailedFirst(t *testing.T) {
	var b strings.Builder
	for _, c := range []struct {
		identity fleet.IdentityTrust
		boot     fleet.BootTrust
	}{
		{fleet.IdentityUnverified, fleet.BootUnknown}, {fleet.IdentityLab, fleet.BootMeasured},
		{fleet.IdentityListed, fleet.BootEnforced}, {fleet.IdentityHardware, fleet.BootEnforced},
	} {
		findings := []fleet.Finding{
			{Check: "ek", OK: true}, {Check: "ek-certificate", OK: true, Detail: "CN=x"}, {Check: "ek-chain", OK: false, Detail: "to no vendor root"},
			{Check: "ek-listed", OK: false, Detail: "the EK is on no list"}, {Check: "new-check", OK: false},
			{Check: "log-pcr0", OK: true}, {Check: "boot-measured", OK: true}, {Check: "boot-enforced", OK: false, Detail: "Secure Boot is off"},
		}
		axes, rest := Explain(fleet.Request{Identity: c.identity, Boot: c.boot, Findings: findings})
		n := len(rest)
		for _, a := range axes {
			fmt.Fprintf(&b, "%s %s: %s\n", a.Name, a.Verdict, a.Meaning)
			for _, f := range a.Checks {
				fmt.Fprintf(&b, "  %v %s %s\n", f.OK, f.Check, f.Detail)
				n++
			}
		}
		for _, f := range rest {
			fmt.Fprintf(&b, "rest %v %s\n", f.OK, f.Check)
		}
		if n != len(findings) || findings[0].Check != "ek" {
			t.Errorf("%d of %d checks are shown, or the request was changed", n, len(findings))
		}
	}
	golden(t, "explain.golden", b.String())
}

func TestDiffNamesTheLikelyCause(t *testing.T) {
	for i, want := range map[int]string{0: "firmware update", 2: "option ROM", 7: "Secure Boot was switched"} {
		before, after := evidence("a"), evidence("a")
		after.PCRs[i] = hashOf("other")
		d := Diff(before, after)
		if len(d) != 1 || !strings.Contains(d[0], fmt.Sprintf("PCR %d (", i)) || !strings.Contains(d[0], want) {
			t.Errorf("PCR %d: %q", i, d)
		}
		for j, other := range map[int]string{0: "firmware update", 2: "option ROM,", 7: "Secure Boot was switched"} {
			if j != i && strings.Contains(strings.Join(d, ""), other) {
				t.Errorf("PCR %d: %q", i, d)
			}
		}
	}
	if d := Diff(evidence("a"), evidence("a")); len(d) != 0 {
		t.Errorf("no change: %q", d)
	}
}
