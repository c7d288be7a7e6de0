package central

import (
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/text"
)

const (
	// explainRequests and explainEvents bound what is searched for one
	// person's question, explainLines what is answered.
	explainRequests = 1000
	explainEvents   = 2000
	explainLines    = 8
)

// explain adds what a person who decides asks next: who else looks like this
// machine, and where was it seen.
func explain(p *part, r fleet.Request, out *musterv1.GetRequestResponse) error {
	t := p.t
	site := func(o fleet.Request) string { return o.Site }
	alike, err := t.LookAlikes(r.Tenant, r.Node, r.Evidence.Serial, r.Evidence.UUID, maxLookAlikes)
	if err != nil {
		return err
	}
	if alike, err = filter(p, access.Request, alike, site); err != nil {
		return err
	}
	lines := enroll.LookAlikes(r.Evidence, alike)
	others, err := t.Requests(r.Tenant, nil, explainRequests)
	if err != nil {
		return err
	}
	if others, err = filter(p, access.Request, others, site); err != nil {
		return err
	}
	for _, o := range others {
		if o.State.Live() && o.Node != r.Node {
			lines = append(lines, twinLines(r, o)...)
		}
	}
	for _, l := range lines[:min(len(lines), explainLines)] {
		out.LookAlikes = append(out.LookAlikes, text.Clean(l, 512))
	}
	if n := len(lines) - explainLines; n > 0 {
		out.LookAlikes = append(out.LookAlikes, fmt.Sprintf("and %d more", n))
	}
	return bootEventsOf(t, r, out) // of this machine alone
}

// twinLines compares what people could take for the same: names that look
// alike, and network addresses.
func twinLines(r, o fleet.Request) (out []string) {
	a, b := r.Evidence.Serial, o.Evidence.Serial
	if a != "" && b != "" && a != b && text.LooksLike(a, b) {
		out = append(out, fmt.Sprintf("Node %s claims the serial number %q, which looks like %q and is another", o.Node, b, a))
	}
	for _, mac := range macsOf(r) {
		if slices.Contains(macsOf(o), mac) {
			out = append(out, fmt.Sprintf("Node %s claims the same MAC address %s; they are different TPMs", o.Node, mac))
			break
		}
	}
	return out
}

func macsOf(r fleet.Request) (out []string) {
	for _, n := range r.Evidence.Hardware.NICs {
		if n.MAC != "" {
			out = append(out, strings.ToLower(n.MAC))
		}
	}
	return out
}

// bootEventsOf finds the last steps of booting of the machine's addresses.
func bootEventsOf(t store.Reader, r fleet.Request, out *musterv1.GetRequestResponse) error {
	macs := macsOf(r)
	if len(macs) == 0 {
		return nil
	}
	last, err := t.LastEvent(r.Tenant)
	if err != nil {
		return err
	}
	after := uint64(0)
	if last > explainEvents {
		after = last - explainEvents
	}
	events, err := t.Events(r.Tenant, after, explainEvents)
	if err != nil {
		return err
	}
	for _, e := range events {
		if strings.HasPrefix(e.Kind, "pxe.") && slices.Contains(macs, strings.ToLower(e.MAC)) {
			out.BootEvents = append(out.BootEvents, api.EventToProto(e))
		}
	}
	if n := len(out.BootEvents); n > explainLines {
		out.BootEvents = out.BootEvents[n-explainLines:]
	}
	return nil
}
