package member

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/agent/slots"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

// Report is what `muster-node status` shows. Fields are only ever added.
// Times are RFC 3339 by the node's clock, "" if never.
type Report struct {
	Node  fleet.NodeID `json:"node"`
	Words string       `json:"words"`
	// Site is "" before the node was assigned to one.
	Tenant string `json:"tenant,omitempty"`
	Site   string `json:"site"`
	// ClusterUID and Epoch are of the cluster the node belongs to.
	ClusterUID string `json:"cluster_uid"`
	Epoch      uint64 `json:"epoch"`
	// State, Role, Reason and Blocker are the planner's; Since is when state
	// or blocker last changed.
	State   string `json:"state"`
	Role    string `json:"role"`
	Reason  string `json:"reason"`
	Blocker string `json:"blocker"`
	// NeedsPerson: somebody has to do something.
	NeedsPerson bool   `json:"needs_person"`
	Since       string `json:"since"`
	Action      string `json:"action"`
	Peers       []Seen `json:"peers"`
	// Slot is the slot of the disk that runs ("a", "b"), "" if none does.
	// Digest is the image's, Boot how it came up ("enforced", "measured",
	// "unknown"): claims of this node, judged by others.
	Slot   string `json:"slot"`
	Digest string `json:"digest"`
	Boot   string `json:"boot"`
	// System is what the node does about its own system; nil if no slot runs.
	System *slots.Now `json:"system,omitempty"`
	// Data is the data partition; nil if this system has none of ours.
	Data *data.Report `json:"data,omitempty"`
	// Charter is the version of the site's charter, "" without one.
	Charter string `json:"charter"`
	// LastCentral is when the centre last answered.
	LastCentral string `json:"last_central"`

	Address string `json:"address,omitempty"`
	LAN     string `json:"lan,omitempty"`
	Version string `json:"version,omitempty"`
	Image   string `json:"image,omitempty"`
	Boots   uint64 `json:"boots"`
	Run     string `json:"run"`
	UptimeS int64  `json:"uptime_s"`
	Mark    string `json:"mark,omitempty"`
	K3s     K3sNow `json:"k3s"`
	// Voters and Learners are those of K3s, again.
	Voters   int    `json:"voters"`
	Learners int    `json:"learners"`
	Plan     string `json:"plan,omitempty"`
	LeaseS   int64  `json:"lease_s,omitempty"`
	Order    string `json:"order,omitempty"`
	Enrolled string `json:"enrollment,omitempty"`
	// Problems are things that do not work and are tried again.
	Problems map[string]string `json:"problems,omitempty"`
	// Spooled is how much the centre has yet to learn; Lost was dropped.
	Spooled int    `json:"spooled"`
	Lost    uint64 `json:"lost,omitempty"`
}

// K3sNow is k3s on this node.
type K3sNow struct {
	Process string `json:"process"` // "none", "agent" or "server"
	API     bool   `json:"api"`
	Version string `json:"version,omitempty"`
	// Voters and Learners are etcd's, Nodes and Ready those of Kubernetes:
	// servers only.
	Voters   int            `json:"voters"`
	Learners int            `json:"learners"`
	Nodes    int            `json:"nodes"`
	Ready    int            `json:"ready"`
	Servers  []fleet.NodeID `json:"servers,omitempty"`
	Virgin   bool           `json:"virgin"`
	FsyncMS  float64        `json:"fsync_ms,omitempty"`
}

// Seen is one peer.
type Seen struct {
	Node  fleet.NodeID `json:"node"`
	Words string       `json:"words"`
	Addr  string       `json:"addr"`
	// AgeS is how long ago it was heard.
	AgeS       float64 `json:"age_s"`
	Fresh      bool    `json:"fresh"`
	Role       string  `json:"role"`
	State      string  `json:"state"`
	Blocker    string  `json:"blocker,omitempty"`
	ClusterUID string  `json:"cluster_uid,omitempty"`
	Epoch      uint64  `json:"epoch,omitempty"`
	API        bool    `json:"api"`
	Voters     int     `json:"voters,omitempty"`
}

var processNames = [...]string{"none", "agent", "server"}

// Report returns what people see of this node. What the agent knows besides
// (slot, centre, enrollment) is the caller's to add.
func (m *Member) Report() Report {
	docs := m.cfg.Papers.Documents()
	mandate := m.mandate()
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.disk()
	now := m.mono()
	r := Report{
		Node: m.cfg.Self, Words: fleet.Words(m.cfg.Self), State: m.shown.State.String(), Role: d.Role.String(), Reason: m.shown.Reason,
		Blocker: string(m.shown.Blocker), NeedsPerson: m.shown.Blocker.NeedsPerson() || m.shown.Blocker == NodeFault,
		Since: m.since.UTC().Format(time.RFC3339), Action: m.shown.Action.String(), LAN: m.lanAddr(),
		Boots: m.cfg.Journal.Boots(), Run: m.cfg.Boot, UptimeS: int64(now / time.Second), Mark: d.Mark,
		Problems: maps.Clone(m.failures), Peers: []Seen{}, Boot: "unknown",
	}
	if self, ok := docs.Admitted(m.cfg.Self); ok {
		r.Tenant, r.Site, r.Address = self.Tenant, self.Site, self.Address
	}
	if docs.Charter != nil {
		r.Charter = docs.Charter.Version.String()
	}
	if d.Record != nil {
		r.ClusterUID, r.Epoch = d.Record.UID, d.Record.Epoch
		r.K3s.Servers = d.Record.Servers
	} else if d.Intent != nil {
		r.ClusterUID = d.Intent.UID
	}
	if mandate != nil {
		r.Order = mandate.ID
	}
	k := m.k3s
	r.K3s.Process, r.K3s.API, r.K3s.Version, r.K3s.Virgin = processNames[min(int(k.Process), len(processNames)-1)], k.API, k.Version, k.Virgin
	r.K3s.FsyncMS = float64(k.Fsync.Microseconds()) / 1000
	for _, x := range k.Members {
		if x.Learner {
			r.K3s.Learners++
		} else {
			r.K3s.Voters++
		}
	}
	r.Voters, r.Learners = r.K3s.Voters, r.K3s.Learners
	for _, x := range k.Nodes {
		r.K3s.Nodes++
		if x.Ready {
			r.K3s.Ready++
		}
	}
	if l := k.Ledger; l != nil && l.Plan.Active() {
		r.Plan = l.Plan.ID + " " + l.Plan.Phase.String()
	} else if d.Step != nil {
		r.Plan = d.Step.Plan
	}
	if left := m.lease.Until - now; left > 0 {
		r.LeaseS = int64(left / time.Second)
	}
	for id, h := range m.peers {
		s := Seen{Node: id, Words: fleet.Words(id), Addr: m.addrOf(id, h, d), AgeS: (now - h.at).Round(100 * time.Millisecond).Seconds(),
			Fresh: now-h.at <= m.cfg.Policy.PeerFresh, Role: h.st.Role.String(), State: h.st.State.String(), Blocker: string(h.st.Blocker),
			API: h.st.API, Voters: h.st.Voters}
		if h.st.Record != nil {
			s.ClusterUID, s.Epoch = h.st.Record.UID, h.st.Record.Epoch
		}
		r.Peers = append(r.Peers, s)
	}
	slices.SortFunc(r.Peers, func(a, b Seen) int { return cmp.Compare(a.Node, b.Node) })
	if m.cfg.Spool != nil {
		st := m.cfg.Spool.Stats()
		r.Spooled, r.Lost = st.Entries, st.Lost
	}
	return r
}

// JSON is the report as `muster-node status -o json` prints it.
func (r Report) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("member: report: %w", err)
	}
	return append(b, '\n'), nil
}

// ParseReport reads what an agent of this or an older version answered.
func ParseReport(b []byte) (Report, error) {
	var r Report
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("member: read report: %w", err)
	}
	return r, nil
}

// doing says what a node is, in words for the phone.
var doing = map[string]string{
	"":     "It does not know yet what it is.",
	"none": "It belongs to no cluster yet.", "worker": "It is a worker of the cluster.",
	"candidate": "It is becoming a server of the cluster.", "server": "It is a server of the cluster.",
}

// Text is the report for a person, perhaps on the phone: short lines, the
// important first, nothing that has to be spelled.
func (r Report) Text() string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	say("This machine is called:  %s", text.Clean(r.Words, 200))
	switch {
	case r.Site == "":
		say("It is assigned to no site.")
	default:
		say("Site:                    %s", text.Clean(r.Site, 80))
	}
	say("%s", cmp.Or(doing[r.Role], "Its role is "+r.Role+"."))
	say("")
	head := "It says:"
	switch {
	case r.NeedsPerson:
		head = "SOMEBODY MUST HELP. It says:"
	case r.Blocker != "":
		head = "It waits, and goes on by itself. It says:"
	}
	say("%s", head)
	say("  %s", text.Clean(r.Reason, 600))
	code := cmp.Or(r.Blocker, "none")
	say("  (state %s, code %s, since %s)", r.State, code, r.Since)
	if r.Enrolled != "" {
		say("  Centre: %s", text.Clean(r.Enrolled, 300))
	}
	if x := r.System; x != nil {
		say("  System: %s, %s", cmp.Or(text.Clean(x.Version, 60), "unknown"), text.Clean(x.Reason, 300))
	}
	if d := r.Data; d != nil && (!d.Encrypted || d.Help != "") {
		say("  Disk: %s %s", text.Clean(d.Reason, 300), text.Clean(d.Help, 300))
	}
	say("")
	if len(r.Peers) == 0 {
		say("It sees no other machine of this site.")
	} else {
		say("Other machines of this site:")
		for _, p := range r.Peers {
			when := "now"
			if !p.Fresh {
				when = "last heard " + ago(time.Duration(p.AgeS*float64(time.Second)))
			}
			say("  %-44s %-9s %s", text.Clean(p.Words, 44), p.Role, when)
		}
	}
	if len(r.Problems) > 0 {
		say("")
		say("What does not work and is tried again:")
		for _, k := range slices.Sorted(maps.Keys(r.Problems)) {
			say("  %s: %s", text.Clean(k, 60), text.Clean(r.Problems[k], 300))
		}
	}
	say("")
	if r.LastCentral == "" {
		say("The centre has not answered since this machine started. The site runs without it.")
	} else {
		say("The centre last answered at %s.", r.LastCentral)
	}
	say("node %s, cluster %s, epoch %d, charter %s, boot %s, slot %s", r.Node, cmp.Or(r.ClusterUID, "none"), r.Epoch, cmp.Or(r.Charter, "none"), r.Boot, cmp.Or(r.Slot, "none"))
	return b.String()
}

func ago(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d seconds ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d minutes ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d hours ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

// Observed returns what was last seen of this node's k3s, and its role in the
// journal.
func (m *Member) Observed() (cb.K3s, cb.Role) {
	role := m.cfg.Journal.Disk().Role
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.k3s, role
}
