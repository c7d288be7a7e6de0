package firmware

import (
	"fmt"
	"time"
)

// Verdict is what the health gate says of the running system.
type Verdict uint8

const (
	// Undecided: more time is needed, or something outside this box is missing
	// that it cannot be blamed for.
	Undecided Verdict = iota
	// Healthy: it may be blessed.
	Healthy
	// Failed: this system does not work on this box.
	Failed
)

var verdictNames = [...]string{"undecided", "healthy", "failed"}

// String returns the verdict in a word.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// Health are the facts of the gate. All of them are about this box: what is
// beyond its cable can neither fail nor bless it.
type Health struct {
	// Up is the time since the system started, by the monotonic clock.
	Up time.Duration
	// RootVerified: the root file system is the expected dm-verity root.
	RootVerified bool
	// DataMounted: the data partition is there, unlocked and writable.
	DataMounted bool
	// Identity: the agent has its keys and its node ID is the one on disk.
	Identity bool
	// Wanted: this node is to run k3s; false for a node that waits for its
	// site.
	Wanted bool
	// Process: k3s has been running without a restart for Policy.Steady.
	Process bool
	// NodeReady: k3s's own Node is Ready.
	NodeReady bool
	// Server: this node runs etcd; Member: its own etcd is started and up to
	// date; Quorum: the cluster has a leader.
	Server, Member, Quorum bool
	// APIReachable: some server's API answers; for workers.
	APIReachable bool
}

// HealthDeadline is when an unhealthy system is given up if nobody chose.
const HealthDeadline = 15 * time.Minute

// Gate are the gate's limits; zero fields get the defaults.
type Gate struct {
	// Deadline is when an unhealthy system is given up (HealthDeadline).
	Deadline time.Duration
}

// Judge says whether the running system may stay, and why.
func (g Gate) Judge(h Health) (Verdict, string) {
	if g.Deadline == 0 {
		g.Deadline = HealthDeadline
	}
	late := h.Up >= g.Deadline
	for _, c := range []struct {
		ok  bool
		bad string
	}{
		{h.RootVerified, "its root is not the verified one"},
		{h.DataMounted, "the data partition is not there"},
		{h.Identity, "the node does not find its identity"},
	} {
		if !c.ok {
			return failedWhen(late, c.bad)
		}
	}
	if !h.Wanted {
		return Healthy, "the box is sound; it waits for its site"
	}
	if !h.Process {
		return failedWhen(late, "k3s does not stay up")
	}
	switch {
	case h.Server && !h.Quorum:
		return Undecided, "the cluster has no majority at the moment; that is not this box's fault"
	case h.Server && !h.Member:
		return failedWhen(late, "its etcd does not come up")
	case !h.Server && !h.APIReachable:
		return Undecided, "no server of the cluster answers; that is not this box's fault"
	case !h.NodeReady:
		return failedWhen(late, "k3s does not become ready")
	}
	return Healthy, "k3s is ready"
}

func failedWhen(late bool, why string) (Verdict, string) {
	if late {
		return Failed, why
	}
	return Undecided, why + " yet"
}
