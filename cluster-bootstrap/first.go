package clusterbootstrap

import (
	"time"

	"github.com/muster-edge/muster/fleet"
)

// Founding mode first. A node looks around for a minute; of those that see
// each other the lowest ID claims; it founds when every peer that it has seen
// within the last minute shows, in a status not older than PeerFresh, that it
// acknowledged this very claim. Who acknowledged founds nothing and
// acknowledges nobody else, until the claimant withdraws or has not been seen
// for AckHold.

// acknowledged handles a written acknowledgement; nil: go on without it.
func (v *view) acknowledged() (State, []Action) {
	ack := v.Disk.Ack
	p := v.peer(ack.Node)
	switch {
	case p != nil && p.Age <= v.pol.PeerFresh:
		s := p.Status
		if (s.Claim != nil && *s.Claim == *ack) || s.Intent || s.Record != nil {
			return v.wait(Surveying, AckGiven, "I agreed that "+v.name(ack.Node)+" starts the cluster, and wait for it.")
		}
		return v.survey(v.name(ack.Node) + " does not start the cluster after all; I look around again.")
	case v.AckSeen <= v.pol.AckHold && !v.Docs.removed(ack.Node):
		return v.wait(Waiting, AckGiven, "I agreed that "+v.name(ack.Node)+" starts the cluster, but have not heard from it since.")
	}
	return v.survey(v.name(ack.Node) + " wanted to start the cluster and is gone; I look around again.")
}

// ackBinds: the claim that this node acknowledged stands, so that its owner may
// found at any moment. Not even an order founds then. An owner that is a server
// has done so.
func (v *view) ackBinds() bool {
	if v.Disk.Ack == nil {
		return false
	}
	p := v.peer(v.Disk.Ack.Node)
	return p != nil && p.Age <= v.pol.PeerFresh && p.Status.Role != RoleServer && p.Status.Claim != nil && *p.Status.Claim == *v.Disk.Ack
}

func (v *view) survey(why string) (State, []Action) {
	return Surveying, []Action{{Kind: StartSurvey, Reason: why}}
}

func (v *view) first(mayServe bool) (State, []Action) {
	if v.Survey == nil {
		return v.survey("I look around for other nodes of this site before anybody starts a cluster.")
	}
	age := v.Mono - v.Survey.Since
	claim := v.bestClaim()
	if v.Claim != nil {
		if claim != nil && betterFounder(claim.Node, v.Self) {
			return Surveying, []Action{{Kind: WithdrawClaim, Reason: v.name(claim.Node) + " has the better claim."}}
		}
		if p := v.notAcknowledging(); p != nil {
			return v.wait(Claiming, AckMissing, "I want to start the cluster; "+v.name(p.Status.Node)+" has not agreed yet.")
		}
		return v.found("Every node that I see agreed that I start the cluster.")
	}
	// A survey shorter than PeerFresh may follow an acknowledgement that
	// somebody still believes in.
	if claim != nil {
		if age <= v.pol.PeerFresh+v.pol.PeerFresh/4 {
			return v.wait(Surveying, Settling, "I look around for other nodes of this site.")
		}
		return Surveying, []Action{{Kind: AckClaim, Claim: claim, Reason: "I agree that " + v.name(claim.Node) + " starts the cluster."}}
	}
	if age < v.pol.Survey {
		return v.wait(Surveying, Settling, "I look around for other nodes of this site.")
	}
	if v.Disk.member() {
		return v.absent("I was in a cluster of this site before, so that I must not start another one.")
	}
	if !mayServe {
		return v.wait(Waiting, FounderAway, "I may not be a server, so that another node must start the cluster.")
	}
	if b := v.betterPeer(); b != nil && age < 3*v.pol.Survey {
		return v.wait(Surveying, Settling, "I leave it to "+v.name(b.Status.Node)+" to start the cluster.")
	}
	return Claiming, []Action{{Kind: ClaimFounding, Claim: &Claim{Node: v.Self, Round: v.Survey.Round, Token: v.Fresh},
		Reason: "I see no cluster and no better node, so I ask whether I may start one."}}
}

// betterFounder is the tie-break: the lower node ID. IDs are hashes of TPM
// keys, so that nobody picks a good one, and all nodes agree without talking.
func betterFounder(a, b fleet.NodeID) bool { return a < b }

// bestClaim is the best claim among peers heard lately.
func (v *view) bestClaim() *Claim {
	var best *Claim
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Age <= v.pol.PeerFresh && p.Status.Claim != nil && (best == nil || betterFounder(p.Status.Claim.Node, best.Node)) {
			best = p.Status.Claim
		}
	}
	return best
}

// notAcknowledging returns a visible peer that has not agreed to the claim.
func (v *view) notAcknowledging() *Peer {
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Age > v.pol.Survey {
			continue
		}
		if a := p.Status.Ack; p.Age > v.pol.PeerFresh || a == nil || *a != *v.Claim {
			return p
		}
	}
	return nil
}

// betterPeer returns a visible peer that wins the tie-break.
func (v *view) betterPeer() *Peer {
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Age > v.pol.PeerFresh || !betterFounder(p.Status.Node, v.Self) || p.Status.Role != RoleNone {
			continue
		}
		if a, ok := v.Docs.Admitted(p.Status.Node); ok && a.MayServe {
			return p
		}
	}
	return nil
}

// founderSeen returns a fresh peer that has begun to found.
func (v *view) founderSeen() *Peer {
	for i := range v.Peers {
		if p := &v.Peers[i]; p.Age <= v.pol.PeerFresh && p.Status.Intent {
			return p
		}
	}
	return nil
}

// known returns a record of a cluster of this site that was not dissolved.
// Who knows of one founds no other.
func (v *view) known() *Record {
	for i := range v.Docs.Records {
		if r := &v.Docs.Records[i]; r.Into == "" {
			return r
		}
	}
	return nil
}

// silence is the time since any server of cluster uid (of any cluster if uid
// is "") was heard, whether it served or not. A node that served once and is
// no server any more counts until it last served.
func (v *view) silence(uid string) time.Duration {
	d := v.Mono
	for i := range v.Peers {
		p := &v.Peers[i]
		if p.Served < 0 || uid != "" && (p.Status.Record == nil || p.Status.Record.UID != uid) {
			continue
		}
		if p.Status.Role == RoleServer {
			d = min(d, p.Age)
		} else {
			d = min(d, p.Served)
		}
	}
	return d
}
