package drift

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/fleettest"
)

var (
	now   = time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC)
	newer = fleet.ImageRef{Name: "shop", Version: "2", Arch: "amd64", SHA256: digest(2)}
)

const stale = 3 * time.Minute

func digest(n byte) fleet.HexBytes { return append(make([]byte, 31), n) }

func site() fleet.Site {
	s := fleet.Site{Meta: fleet.Meta{Tenant: "default", Name: "shop-7"}}
	s.Spec.Stack, s.Spec.Version, s.Spec.StackSHA256 = "shop", "2", digest(22)
	return s
}

func node(change func(*Node)) Node {
	n := Node{ID: "n-a", Words: "amber canoe", LastSeen: now.Add(-time.Minute), System: fleet.SystemReport{
		Slot: fleet.SlotA, Image: "shop@1", ImageSHA256: digest(1), State: fleet.SystemCurrent,
		Stack: &fleet.StackRef{Name: "shop", Version: "1", SHA256: digest(11)},
	}}
	if change != nil {
		change(&n)
	}
	return n
}

func TestCompare(t *testing.T) {
	for name, row := range map[string]struct {
		node  func(*Node)
		state State
		why   string
	}{
		"it runs the version":        {func(n *Node) { n.System.Stack.SHA256 = digest(22) }, Current, ""},
		"it runs its image":          {func(n *Node) { n.System.Stack, n.System.ImageSHA256 = nil, digest(2) }, Current, ""},
		"another signature of it":    {nil, Updating, "shop@1 and has not begun"},
		"current, and old knowledge": {func(n *Node) { n.System.Stack.SHA256 = digest(22); n.LastSeen = now.Add(-time.Hour) }, Current, ""},
		"it fetches":                 {func(n *Node) { n.System.State, n.System.Percent = fleet.SystemFetching, 40 }, Updating, "fetching, 40 %"},
		"it tries":                   {func(n *Node) { n.System.State, n.System.Stack.SHA256 = fleet.SystemTrying, digest(22) }, Updating, "trying"},
		"it waits":                   {func(n *Node) { n.System.State, n.System.Reason = fleet.SystemWaiting, "the window opens at 02:00" }, Waiting, "opens at 02:00"},
		"it is away":                 {func(n *Node) { n.LastSeen = now.Add(-time.Hour) }, Waiting, "when it is back; last heard of 2027-01-02T02:04:05Z (1h0m0s ago)"},
		"it was never heard of":      {func(n *Node) { n.LastSeen, n.System = time.Time{}, fleet.SystemReport{} }, Waiting, "last heard of never"},
		"it says nothing":            {func(n *Node) { n.System = fleet.SystemReport{} }, Unknown, "said nothing"},
		"it runs recovery":           {func(n *Node) { n.System = fleet.SystemReport{State: fleet.SystemRecovery, Slot: fleet.SlotRecovery} }, Waiting, "muster order install n-a"},
		"it rolled back":             {func(n *Node) { n.System.State, n.System.Reason = fleet.SystemRolledBack, "k3s never became ready" }, Blocked, "k3s never"},
		"it failed here":             {func(n *Node) { n.System.Failed = []fleet.FailedImage{{SHA256: digest(2), Reason: "panic"}} }, Blocked, "clear-failed n-a --image shop@2"},
		"another image failed here":  {func(n *Node) { n.System.Failed = []fleet.FailedImage{{SHA256: digest(3)}} }, Updating, "has not begun"},
		"it failed, and is away":     {func(n *Node) { n.System.State = fleet.SystemFailed; n.LastSeen = now.Add(-time.Hour) }, Blocked, "last heard of"},
	} {
		r := Compare(now, stale, Input{Site: site(), Nodes: []Node{node(row.node)}, Images: []fleet.ImageRef{newer}})
		if r.State != row.state || !strings.Contains(r.Why, row.why) || (r.State == Current) != (len(r.Outliers) == 0) {
			t.Errorf("%s: %s, %q; want %s, %q", name, r.State, r.Why, row.state, row.why)
		}
	}
}

func TestTheWorstNodeCounts(t *testing.T) {
	in := Input{Site: site(), Images: []fleet.ImageRef{newer}, Nodes: []Node{
		node(func(n *Node) { n.System.Stack.SHA256 = digest(22) }),
		node(nil),
		node(func(n *Node) {
			n.Words, n.System.State, n.System.Reason = "blue door", fleet.SystemFailed, "the disk is full"
		}),
	}}
	r := Compare(now, stale, in)
	if r.State != Blocked || r.Current != 1 || r.Nodes != 3 || len(r.Outliers) != 2 || r.Why != "blue door: failed: the disk is full (and 1 more of its nodes)" {
		t.Errorf("%+v", r)
	}
	in.Site.Spec.Stack = ""
	if r := Compare(now, stale, in); r.State != Unassigned {
		t.Errorf("without a stack: %+v", r)
	}
	if r := Compare(now, stale, Input{Site: site()}); r.State != Unknown || r.Why != "the site has no nodes" {
		t.Errorf("without nodes: %+v", r)
	}
}

func TestFiveHundredSites(t *testing.T) {
	var all []Result
	for i := range 500 {
		s := site()
		s.Name = fmt.Sprintf("shop-%03d", i)
		n := node(func(n *Node) { n.System.Stack.SHA256 = digest(22) })
		switch i {
		case 7:
			n = node(func(n *Node) { n.System.State = fleet.SystemFailed })
		case 8, 9:
			n = node(func(n *Node) { n.LastSeen = now.Add(-time.Hour) })
		case 10:
			n.LastSeen = now.Add(-time.Hour)
		}
		all = append(all, Compare(now, stale, Input{Site: s, Nodes: []Node{n}, Images: []fleet.ImageRef{newer}}))
	}
	all = append(all, Compare(now, stale, Input{Site: fleet.Site{Meta: fleet.Meta{Name: "empty"}}}))
	f := Sum(all)
	if f.String() != "497 of 500 current (1 of them as last known); 1 blocked, 2 waiting" || f.Unassigned != 1 {
		t.Errorf("%s, %d unassigned", f, f.Unassigned)
	}
	if len(f.Outliers) != 3 || f.Outliers[0].Site != "shop-007" || f.Outliers[2].Site != "shop-009" {
		t.Errorf("%+v", f.Outliers)
	}
	if s := Sum(nil).String(); s != "no site has a stack" {
		t.Error(s)
	}
}

// Whatever nodes say, a site is current only if all of them are, and each that
// is not has a reason.
func TestEveryOutlierHasAReason(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := Input{Site: site(), Images: []fleet.ImageRef{newer}}
		for range rapid.IntRange(0, 4).Draw(t, "nodes") {
			in.Nodes = append(in.Nodes, Node{ID: "n-a", Words: "w", LastSeen: now.Add(-time.Duration(rapid.IntRange(0, 600).Draw(t, "age")) * time.Second), System: fleettest.Draw[fleet.SystemReport](t)})
		}
		r := Compare(now, stale, in)
		if r.Current+len(r.Outliers) != len(in.Nodes) || r.State == Current && len(r.Outliers) > 0 || r.State != Current && r.Why == "" {
			t.Fatalf("%+v", r)
		}
		for _, o := range r.Outliers {
			if o.Why == "" || o.State == Current || o.State > r.State {
				t.Fatalf("%+v", o)
			}
		}
	})
}
