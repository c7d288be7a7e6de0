package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// writeRequest shows a request to the person who decides: the verdict and
// what it rests on first, then what changed, who looks alike, where it was
// seen; what the machine says of itself comes last.
func writeRequest(w io.Writer, now time.Time, r fleet.Request, out *musterv1.GetRequestResponse) {
	if out.Lab {
		fmt.Fprintln(w, labBanner)
	}
	s := sheet{w}
	s.line("Request", string(r.ID))
	s.line("State", r.State.String())
	s.line("Words", r.Words)
	s.line("Node", string(r.Node))
	s.line("EK", r.Evidence.EK.String())
	s.line("EK issuer", r.Evidence.EKIssuer)
	s.line("Image", r.Image)
	s.line("Site", r.Site)
	s.line("Labels", labels(r.Labels))
	s.line("First seen", fmt.Sprintf("%s (%s ago)", stamp(r.FirstSeen), ago(now, r.FirstSeen)))
	s.line("Last seen", fmt.Sprintf("%s (%s ago) from %s", stamp(r.LastSeen), ago(now, r.LastSeen), r.Source))
	s.line("Decided", decision(r))
	s.line("Supersedes", string(r.Supersedes))
	s.line("Takes the place of", string(r.Replaces))
	s.line("Revision", fmt.Sprint(r.Revision))
	axes, rest := enroll.Explain(r)
	for _, a := range axes {
		name := strings.ToUpper(a.Name[:1]) + a.Name[1:]
		s.line(name, a.Verdict+": "+a.Meaning)
		findings(w, a.Checks)
	}
	s.list("Changed since that request", out.Diff)
	s.list("Warnings", otherThan(r, out.Diff))
	s.list("Look-alikes", out.LookAlikes)
	var booted []string
	for _, e := range out.BootEvents {
		booted = append(booted, fmt.Sprintf("%s %s %s: %s", stamp(e.GetTime().AsTime()), e.GetMac(), e.GetKind(), e.GetText()))
	}
	s.list("Seen booting", booted)
	if len(rest) > 0 {
		fmt.Fprintln(w, "Findings:")
		findings(w, rest)
	}
	fmt.Fprintln(w, "The machine says of itself (nothing of this is proved):")
	hardware(w, r.Evidence.Hardware)
	switch {
	case out.Refusal != "":
		fmt.Fprintf(w, "Cannot be approved: %s\n", cell(strings.TrimPrefix(out.Refusal, "enroll: refused: ")))
	case r.State == fleet.RequestPending:
		fmt.Fprintf(w, "To decide: muster approve %s --site SITE   or   muster reject %s --reason TEXT\n", r.ID, r.ID)
	}
}

// otherThan are the warnings that do not repeat a line of the diff.
func otherThan(r fleet.Request, diff []string) (out []string) {
	for _, x := range r.Warnings {
		line, repeats := strings.CutPrefix(x, "Changed since request "+string(r.Supersedes)+": ")
		if !repeats || !slices.Contains(diff, line) {
			out = append(out, x)
		}
	}
	return out
}

// findings are the verifier's checks, a line each.
func findings(w io.Writer, checks []fleet.Finding) {
	for _, x := range checks {
		// Not FAIL: a genuine machine has checks that say no, such as
		// boot-enforced with Secure Boot off. Those that must hold end in
		// a refusal before there is a request.
		mark := "yes"
		if !x.OK {
			mark = "no "
		}
		detail := ""
		if x.Detail != "" {
			detail = ": " + cell(x.Detail)
		}
		fmt.Fprintf(w, "  %s %s%s\n", mark, cell(x.Check), detail)
	}
}
