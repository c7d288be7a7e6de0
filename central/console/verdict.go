package console

import (
	"github.com/muster-edge/muster/fleet"
)

// verdict is what the two axes of trust come to, in plain words.
type verdict struct {
	// Tone is one of "good", "lab", "caution", "bad": it chooses colour and
	// sign, and never says anything that Headline does not.
	Tone, Headline string
}

// verdicts has a sentence for each pair. Rows are identities, columns boots.
var verdicts = [4][3]verdict{
	fleet.IdentityUnverified: {
		{"bad", "Nobody vouches for this machine, nor for what it runs"},
		{"bad", "Nobody vouches for this machine"},
		{"bad", "Nobody vouches for this machine"},
	},
	fleet.IdentityLab: {
		{"caution", "A lab machine, and what it runs is not proved"},
		{"lab", "A lab machine that runs our image"},
		{"lab", "A lab machine that can run only our image"},
	},
	fleet.IdentityListed: {
		{"caution", "A machine you listed, but what it runs is not proved"},
		{"good", "A machine you listed, and it runs our image"},
		{"good", "A machine you listed, and it can run only our image"},
	},
	fleet.IdentityHardware: {
		{"caution", "A genuine machine, but what it runs is not proved"},
		{"good", "A genuine machine, and it runs our image"},
		{"good", "A genuine machine, and it can run only our image"},
	},
}

func verdictOf(i fleet.IdentityTrust, b fleet.BootTrust) verdict {
	if int(i) >= len(verdicts) || int(b) >= len(verdicts[0]) {
		return verdict{"bad", "This console does not know the verdict " + i.String() + "/" + b.String()}
	}
	return verdicts[i][b]
}

// toneOfRequest is the colour of a request's state.
func toneOfRequest(s fleet.RequestState) string {
	switch s {
	case fleet.RequestApproved, fleet.RequestIssued:
		return "good"
	case fleet.RequestRejected, fleet.RequestQuarantined:
		return "bad"
	case fleet.RequestPending:
		return "lab"
	}
	return "quiet"
}

func toneOfNode(s fleet.NodeState) string {
	switch s {
	case fleet.NodeActive:
		return "good"
	case fleet.NodeDenied:
		return "bad"
	}
	return "lab"
}
