package enroll

import (
	"fmt"
	"slices"

	"github.com/muster-edge/muster/fleet"
)

// Axis is one of the two verdicts on a request in words, with the checks that
// led to it: those that say no come first.
type Axis struct {
	// Name is "identity" or "boot", Verdict its word.
	Name, Verdict string
	// Meaning is what the word promises, without a full stop.
	Meaning string
	Checks  []fleet.Finding
}

var identityMeaning = map[fleet.IdentityTrust]string{
	fleet.IdentityUnverified: "nobody vouches for this TPM; it may be a program that pretends to be one",
	fleet.IdentityLab:        "the TPM chains to a lab root, which is worth no more than the lab",
	fleet.IdentityListed:     "an operator named this TPM beforehand",
	fleet.IdentityHardware:   "the TPM's vendor vouches for it",
}

var bootMeaning = map[fleet.BootTrust]string{
	fleet.BootUnknown:  "what the machine runs is not proved",
	fleet.BootMeasured: "the machine runs a registered image; nothing kept it from running another",
	fleet.BootEnforced: "the machine runs a registered image, and its firmware lets in nothing but ours",
}

// axisOf sorts the verifier's checks; what is in neither binds the proof
// together, and without it there is no request.
var axisOf = map[string]string{
	"ek-certificate": "identity", "ek-chain": "identity", "ek-listed": "identity",
	"boot-measured": "boot", "boot-enforced": "boot", "log-pcr0": "boot", "log-pcr2": "boot",
}

// Explain says what a request's verdicts rest on; rest are the checks that
// belong to neither.
func Explain(r fleet.Request) (axes []Axis, rest []fleet.Finding) {
	axes = []Axis{
		{Name: "identity", Verdict: r.Identity.String(), Meaning: identityMeaning[r.Identity]},
		{Name: "boot", Verdict: r.Boot.String(), Meaning: bootMeaning[r.Boot]},
	}
	for _, f := range r.Findings {
		switch axisOf[f.Check] {
		case "identity":
			axes[0].Checks = append(axes[0].Checks, f)
		case "boot":
			axes[1].Checks = append(axes[1].Checks, f)
		default:
			rest = append(rest, f)
		}
	}
	for _, checks := range [][]fleet.Finding{axes[0].Checks, axes[1].Checks, rest} {
		slices.SortStableFunc(checks, func(a, b fleet.Finding) int { return rank(a) - rank(b) })
	}
	return axes, rest
}

func rank(f fleet.Finding) int {
	if f.OK {
		return 1
	}
	return 0
}

// pcrCause is what most likely changes a PCR of stable evidence.
var pcrCause = map[int]string{
	0: "likely a firmware update",
	2: "likely an update or a change of an option ROM, such as that of a network or storage card",
	7: "likely Secure Boot was switched, or its keys or lists were changed",
}

// pcrChanged is the line of a Diff about one PCR.
func pcrChanged(i int, before, after fleet.HexBytes) string {
	return fmt.Sprintf("PCR %d (%s) changed: %s -> %s; %s", i, pcrMeaning[i], short(before), short(after), pcrCause[i])
}
