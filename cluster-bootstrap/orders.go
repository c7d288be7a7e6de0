package clusterbootstrap

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Orders: what a person decides and nodes never decide alone. Each is good
// for one node until it ends, and carrying it out twice changes nothing. One
// about a cluster that is lost is heeded only when this node has not heard a
// server of it for Policy.QuorumLost: an order that was not needed must not go
// off when a server merely restarts.

// MandateOf picks what Plan should know of the node's orders: the newest one
// about clusters that has not ended. A newer order replaces an older one. The
// signatures must have been verified.
func MandateOf(orders []fleet.Order, self fleet.NodeID, now time.Time) *Mandate {
	var best *fleet.Order
	var kind MandateKind
	for i := range orders {
		o := &orders[i]
		k, ok := mandateKinds[o.Kind]
		if !ok || o.Node != self || !now.Before(o.NotAfter) {
			continue
		}
		if best == nil || o.Version.Compare(best.Version) > 0 || o.Version.Compare(best.Version) == 0 && o.ID > best.ID {
			best, kind = o, k
		}
	}
	if best == nil {
		return nil
	}
	return &Mandate{ID: best.ID, Kind: kind, UID: best.Cluster, Epoch: best.Epoch, Snapshot: best.Snapshot, Into: best.Into, NotAfter: best.NotAfter}
}

var mandateKinds = map[fleet.OrderKind]MandateKind{fleet.OrderFound: MandateFound, fleet.OrderReset: MandateReset,
	fleet.OrderRestore: MandateRestore, fleet.OrderDissolve: MandateDissolve}

// mandate returns the order that stands, if it is of kind k.
func (v *view) mandate(k MandateKind) *Mandate {
	if m := v.Mandate; m != nil && m.Kind == k && v.now.Before(m.NotAfter) {
		return m
	}
	return nil
}

// foundPrefix begins the UID of the cluster that an order founds, so that the
// mark in the TPM and the records that peers pass on tell that the order has
// been used, even when the disk is gone.
func foundPrefix(order string) string {
	h := sha256.Sum256([]byte("muster/found/v1/" + order))
	return "o" + hex.EncodeToString(h[:8]) + "-"
}

// byOrder reports whether a cluster was founded by an order, as its UID says.
func byOrder(uid string) bool {
	const n = 1 + 16
	if len(uid) <= n || uid[0] != 'o' || uid[n] != '-' {
		return false
	}
	_, err := hex.DecodeString(uid[1:n])
	return err == nil
}

// replaced returns a server of the cluster that a person had founded in place
// of uid, which has long been silent.
func (v *view) replaced(uid string) *Peer {
	if !v.lost(uid) {
		return nil
	}
	if p := v.bestCluster(); p != nil && p.Status.Record.UID != uid && byOrder(p.Status.Record.UID) {
		return p
	}
	return nil
}

// foundOrder returns an order to found that was not used yet.
func (v *view) foundOrder() *Mandate {
	m := v.mandate(MandateFound)
	if m == nil || v.used(m) {
		return nil
	}
	if r := v.known(); r != nil && !v.lost(r.UID) && !v.onlyServer(r.UID) {
		return nil
	}
	return m
}

// used reports whether an order to found has founded a cluster.
func (v *view) used(m *Mandate) bool {
	p := foundPrefix(m.ID)
	return strings.HasPrefix(v.Disk.Mark, p) || slices.ContainsFunc(v.Docs.Records, func(r Record) bool { return strings.HasPrefix(r.UID, p) })
}

// foundByOrder lets a node outside all clusters found one, whatever it was in
// before.
func (v *view) foundByOrder(m *Mandate, mayServe bool) (State, []Action) {
	if !mayServe {
		return 0, nil // void says so
	}
	const why = "An order tells me to start the cluster."
	if v.Mono < v.pol.BootCheck {
		return v.wait(Waiting, Settling, why+" I listen for others first.")
	}
	if v.Disk.Datastore || v.Disk.Tombstone || v.Disk.ResetFlag || v.Disk.AgentCert {
		return v.aside(RoleNone, nil, why+" What is left of an old one is moved aside first.")
	}
	return Founding, []Action{{Kind: FoundCluster, Reason: why, Order: m.ID,
		Intent: &Intent{UID: foundPrefix(m.ID) + v.Fresh, Boot: v.Boot, Mode: fleet.FoundNamed}}}
}

// resetOrder returns an order to go on from own data. It is heeded only where
// no majority is, since a cluster that runs needs no reset; or by a candidate
// that no server can confirm any more.
func (v *view) resetOrder(rec *Record) *Mandate {
	if m := v.mandate(MandateReset); m != nil && rec != nil && m.UID == rec.UID && m.Epoch > rec.Epoch && v.Disk.Datastore &&
		(!v.K3s.API || v.Disk.Role == RoleCandidate) && v.serverOf(rec.UID) == nil && v.lost(rec.UID) {
		return m
	}
	return nil
}

// lost reports whether no confirmed server of cluster uid was heard to serve
// for Policy.QuorumLost, or since this agent started.
func (v *view) lost(uid string) bool {
	for i := range v.Peers {
		p := &v.Peers[i]
		if s := p.Status; s.Role == RoleServer && s.Record != nil && s.Record.UID == uid && p.Served >= 0 && p.Served < v.pol.QuorumLost {
			return false
		}
	}
	return v.Mono >= v.pol.QuorumLost
}

// restoreOrder returns an order to restore a snapshot. rec is the record of
// the cluster this node is in, or nil. While other servers run, a restore would
// make a second datastore of the same cluster.
func (v *view) restoreOrder(rec *Record) *Mandate {
	m := v.mandate(MandateRestore)
	switch {
	case m == nil || rec != nil && (m.UID != rec.UID || m.Epoch <= rec.Epoch):
		return nil
	case v.serverOf(m.UID) != nil:
		return nil
	case rec != nil && v.K3s.API && (v.Disk.Role != RoleServer || len(v.K3s.Members) != 1):
		return nil
	case !v.onlyServer(m.UID) && !v.lost(m.UID):
		return nil
	}
	if n, ok := v.Docs.Newest(m.UID); ok && n.Epoch >= m.Epoch {
		return nil
	}
	if a, _ := v.Docs.Admitted(v.Self); !a.MayServe {
		return nil
	}
	return m
}

// onlyServer: this node is all the servers that cluster uid has.
func (v *view) onlyServer(uid string) bool {
	r, ok := v.Docs.Newest(uid)
	return ok && v.Disk.Role == RoleServer && len(r.Servers) == 1 && r.Servers[0] == v.Self
}

func (v *view) restore(m *Mandate) (State, []Action) {
	return v.beginReset(Reset{To: m.Epoch, Snapshot: m.Snapshot, UID: m.UID}, "An order tells me to restore the cluster from a snapshot.")
}

func (v *view) beginReset(r Reset, why string) (State, []Action) {
	return Recovering, []Action{{Kind: BeginReset, Reset: &r, Reason: why}}
}

// dissolveOrder returns an order to give up the cluster uid for one that
// answers now.
func (v *view) dissolveOrder(uid string) *Mandate {
	if m := v.mandate(MandateDissolve); m != nil && m.UID == uid && v.serverOf(m.Into) != nil {
		return m
	}
	return nil
}

// dissolve gives the cluster up as an order says: a snapshot, then the ledger,
// which tells all members.
func (v *view) dissolve(l *Ledger) (State, []Action) {
	m := v.dissolveOrder(l.Record.UID)
	switch {
	case m == nil || l.Record.Into != "":
		return 0, nil
	case l.Plan.Active() && l.Plan.Leader != v.Self:
		return v.wait(Fenced, Settling, "An order tells me to give this cluster up for another one. A plan ends first.")
	case l.Plan.Active() && l.Plan.Phase == PlanPrepare:
		return Fenced, []Action{v.abort(l, "the cluster is given up for another one")}
	case l.Plan.Active():
		return 0, nil // a window is closed first, one way or the other
	case v.K3s.Snapshot != m.ID:
		return Fenced, []Action{{Kind: TakeSnapshot, Plan: m.ID, Order: m.ID,
			Reason: "An order tells me to give this cluster up for another one. I take a snapshot of it first."}}
	}
	n := *l
	n.Record.Into = m.Into
	n.Record.Version++
	return Fenced, []Action{{Kind: WriteLedger, Ledger: &n, Order: m.ID,
		Reason: "An order tells me to give this cluster up for another one. Its members leave and join that."}}
}

// giveUp leaves a cluster that does not answer, by order.
func (v *view) giveUp(rec *Record) (State, []Action) {
	if v.dissolveOrder(rec.UID) == nil || v.K3s.API || v.serverOf(rec.UID) != nil || !v.lost(rec.UID) {
		return 0, nil
	}
	return v.aside(RoleNone, nil, "An order tells me to leave this cluster, which does not answer, for another one.")
}

// void says why the order that stands cannot be carried out by this node as
// things are; "" if it can, or was.
func (v *view) void() string {
	m := v.Mandate
	if m == nil || !v.now.Before(m.NotAfter) {
		return ""
	}
	rec, mine := v.Disk.Record, false
	if rec != nil {
		mine = rec.UID == m.UID
	}
	adm, _ := v.Docs.Admitted(v.Self)
	newest, known := v.Docs.Newest(m.UID)
	served := v.K3s.API || v.serverOf(m.UID) != nil
	switch m.Kind {
	case MandateFound:
		switch {
		case v.used(m):
			return ""
		case !adm.MayServe:
			return "An order tells me to start a cluster, but my admission does not let me be a server."
		case v.Disk.Role == RoleServer && v.Disk.Datastore:
			return "An order tells me to start a cluster, but I hold the data of one. That takes an order to reset, restore or dissolve."
		case v.bestCluster() != nil || rec != nil && v.serverOf(rec.UID) != nil || v.K3s.API:
			return "An order tells me to start a cluster, but this site has one that answers."
		}
	case MandateReset:
		switch {
		case known && newest.Epoch >= m.Epoch:
			return ""
		case !v.Disk.Datastore:
			return "An order tells me to go on from my own data, but I have none. It must go to a node that was a server."
		case !mine:
			return "An order tells me to go on from my own data, but names another cluster."
		case served && v.Disk.Role != RoleCandidate:
			return "An order tells me to go on from my own data alone, but the cluster runs. Nothing is to be done."
		}
	case MandateRestore:
		switch {
		case known && newest.Epoch >= m.Epoch:
			return ""
		case !adm.MayServe:
			return "An order tells me to restore a snapshot, but my admission does not let me be a server."
		case v.Disk.Role != RoleNone && !mine:
			return "An order tells me to restore a snapshot, but of another cluster than mine."
		case served && !(v.onlyServer(m.UID) && len(v.K3s.Members) == 1):
			return "An order tells me to restore a snapshot, but servers of the cluster run. All but the one that restores must be removed first."
		}
	case MandateDissolve:
		switch {
		case !mine || known && newest.Into != "":
			return ""
		case v.serverOf(m.Into) == nil:
			return "An order tells me to give this cluster up for another one, but I hear no server of that."
		case v.Disk.Role == RoleWorker && served:
			return "An order tells me to give this cluster up for another one, but I am a worker. It must go to a server."
		}
	}
	return ""
}

// pending says what the order that stands waits for; "" if it waits for
// nothing.
func (v *view) pending() string {
	m := v.Mandate
	if m == nil || !v.now.Before(m.NotAfter) {
		return ""
	}
	uid := m.UID
	if m.Kind == MandateFound {
		r := v.known()
		if r == nil || v.used(m) || v.onlyServer(r.UID) {
			return ""
		}
		uid = r.UID
	}
	r, known := v.Docs.Newest(uid)
	switch {
	case v.lost(uid) || known && r.Into != "" || (m.Kind == MandateReset || m.Kind == MandateRestore) && known && r.Epoch >= m.Epoch:
		return ""
	case m.Kind == MandateDissolve && (v.Disk.Record == nil || v.Disk.Record.UID != uid || v.K3s.API):
		return ""
	}
	return "An order stands for the case that the cluster is lost; I heed it when no server has answered for " +
		strconv.Itoa(int(v.pol.QuorumLost/time.Minute)) + " minutes."
}

// noteOrder says it when an order stands that is not carried out.
func (v *view) noteOrder(acts []Action) {
	a := &acts[len(acts)-1]
	if a.Kind != Wait || v.Mandate == nil {
		return
	}
	if why := v.void(); why != "" {
		a.Reason = why + " " + a.Reason
		if !a.Blocker.NeedsPerson() {
			a.Blocker = OrderVoid
		}
	} else if why := v.pending(); why != "" {
		a.Reason = why + " " + a.Reason
	}
}
