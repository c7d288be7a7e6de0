package clusterbootstrap

import (
	"errors"
	"fmt"
	"time"
)

// Policy holds the protocol's timers. They must be the same on all nodes of a
// site (they come with the image); what an owner chooses is in the charter.
// Zero fields get the defaults.
type Policy struct {
	// Survey is how long a node of mode first looks around before it claims,
	// and for how long a peer that was seen counts as visible (60 s).
	Survey time.Duration
	// PeerFresh is how long what a peer said is believed (20 s).
	PeerFresh time.Duration
	// AckHold is how long an acknowledgement binds after the claimant was last
	// seen (10 min).
	AckHold time.Duration
	// BootCheck is how long a server listens for newer records before it
	// starts (15 s).
	BootCheck time.Duration
	// Lease is the length of a fence lease (30 s), LeaseRenew when it is
	// renewed (5 s), LeaseMargin what the leader adds for clocks that differ
	// and for killing k3s (15 s).
	Lease, LeaseRenew, LeaseMargin time.Duration
	// QuorumGrace is how long /db/info may fail inside the window before the
	// leader resets to its own data (45 s, more than k3s needs to start).
	QuorumGrace time.Duration
	// PrepareLimit and WindowLimit bound the two phases (3 min, 10 min).
	PrepareLimit, WindowLimit time.Duration
	// RetryAfter is the pause after a failed plan, doubled each time up to
	// eightfold (2 min).
	RetryAfter time.Duration
	// QuorumLost is when missing servers become a person's matter (10 min).
	QuorumLost time.Duration
	// MaterialAge is how long join material is used (5 min).
	MaterialAge time.Duration
	// FoundLimit is how long the first server may take to come up for the first
	// time (5 min).
	FoundLimit time.Duration
	// LearnerLimit is how long a new etcd member may be a learner before it is
	// taken out again (5 min).
	LearnerLimit time.Duration
	// FsyncLimit is the slowest disk, as K3s.Fsync, that a new server may have
	// (100 ms: a fifth of k3s's heartbeat of 500 ms).
	FsyncLimit time.Duration
	// StepDown is how long two servers wait for a third one before one of them
	// becomes a worker (15 min). Two votes are worse than one: either machine
	// stops the API.
	StepDown time.Duration
}

// WithDefaults returns p with every zero field set.
func (p Policy) WithDefaults() Policy {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&p.Survey, 60*time.Second)
	set(&p.PeerFresh, 20*time.Second)
	set(&p.AckHold, 10*time.Minute)
	set(&p.BootCheck, 15*time.Second)
	set(&p.Lease, 30*time.Second)
	set(&p.LeaseRenew, 5*time.Second)
	set(&p.LeaseMargin, 15*time.Second)
	set(&p.QuorumGrace, 45*time.Second)
	set(&p.PrepareLimit, 3*time.Minute)
	set(&p.WindowLimit, 10*time.Minute)
	set(&p.RetryAfter, 2*time.Minute)
	set(&p.QuorumLost, 10*time.Minute)
	set(&p.MaterialAge, 5*time.Minute)
	set(&p.FoundLimit, 5*time.Minute)
	set(&p.LearnerLimit, 5*time.Minute)
	set(&p.FsyncLimit, 100*time.Millisecond)
	set(&p.StepDown, 15*time.Minute)
	return p
}

// Validate reports all problems of the timers.
func (p Policy) Validate() error {
	p = p.WithDefaults()
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("clusterbootstrap: policy: "+format, args...))
		}
	}
	for _, d := range []time.Duration{p.Survey, p.PeerFresh, p.AckHold, p.BootCheck, p.Lease, p.LeaseRenew, p.LeaseMargin,
		p.QuorumGrace, p.PrepareLimit, p.WindowLimit, p.RetryAfter, p.QuorumLost, p.MaterialAge, p.FoundLimit, p.LearnerLimit, p.FsyncLimit, p.StepDown} {
		check(d > 0, "a timer is negative (%s)", d)
	}
	check(p.PeerFresh < p.Survey, "peer_fresh %s must be shorter than survey %s", p.PeerFresh, p.Survey)
	check(p.Survey < p.AckHold, "survey %s must be shorter than ack_hold %s", p.Survey, p.AckHold)
	check(p.LeaseRenew*3 <= p.Lease, "lease_renew %s leaves less than three tries in lease %s", p.LeaseRenew, p.Lease)
	check(p.LearnerLimit < p.WindowLimit, "learner_limit %s must be shorter than window_limit %s", p.LearnerLimit, p.WindowLimit)
	check(p.LeaseMargin*20 >= p.Lease, "lease_margin %s is less than a twentieth of lease %s", p.LeaseMargin, p.Lease)
	return errors.Join(errs...)
}
