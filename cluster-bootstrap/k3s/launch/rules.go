package launch

import (
	"fmt"
	"time"
)

// A candidate's k3s is told to end termBefore the end of its lease and is
// killed killBefore it, so that it is gone when the leader may count on that.
// A start needs minLease, or it would only be stopped again.
const (
	termBefore = 3 * time.Second
	killBefore = 500 * time.Millisecond
	minLease   = 8 * time.Second
)

// facts is everything the launcher goes by, at one moment.
type facts struct {
	now     time.Duration // CLOCK_BOOTTIME
	stop    bool          // told to end
	allowed bool          // permission of this boot
	role    RoleNote
	roleErr error
	lease   time.Duration // until when; 0: none
	init    bool
	// What k3s left on disk, and whether its config names a server.
	datastore, tombstone, joins bool
	configErr                   error
	inTheWay                    string // another k3s, or its ports; asked only when about to start

	child *running      // nil: none
	pause time.Duration // until when not to start; 0: none
}

// running is the k3s process that the launcher started.
type running struct {
	role    Role
	init    bool
	started time.Duration
	termed  time.Duration // when it was told to end; 0: not
}

type act uint8

const (
	wait  act = iota // nothing; reason says why
	start            // start k3s for role
	term             // SIGTERM
	kill             // SIGKILL
	end              // nothing is left to do: the launcher ends
)

// decide is the launcher's state table; DESIGN.md has it in words.
func decide(f facts, stopTimeout time.Duration) (act, string) {
	if f.child != nil {
		return decideRunning(f, stopTimeout)
	}
	switch {
	case f.stop:
		return end, "told to end"
	case !f.allowed:
		return end, "the node agent does not allow k3s to run in this boot"
	case f.roleErr != nil:
		return wait, f.roleErr.Error()
	case f.role.Role == NoRole:
		return wait, "there is no role file"
	case f.configErr != nil:
		return wait, f.configErr.Error()
	case f.now < f.pause:
		return wait, ""
	}
	switch f.role.Role {
	case Worker:
		if !f.joins {
			return wait, "the config of a worker names no server"
		}
	case Candidate, Joiner:
		switch {
		case f.role.Role == Candidate && (f.lease == 0 || f.lease-f.now < minLease):
			return wait, "a candidate runs under a lease only, and there is none"
		case f.tombstone:
			return wait, "etcd removed this node (tombstone); its data must be moved aside first"
		case !f.joins:
			return wait, "the config names no server to join: k3s would make a cluster of its own"
		}
	case Server:
		switch {
		case f.tombstone:
			return wait, "etcd removed this node (tombstone); its data must be moved aside first"
		case !f.datastore && !f.init:
			return wait, "a server without datastore would make a new cluster, and nobody allowed that"
		}
	}
	if f.inTheWay != "" {
		return wait, f.inTheWay
	}
	return start, ""
}

func decideRunning(f facts, stopTimeout time.Duration) (act, string) {
	c := f.child
	if c.role == Candidate {
		// Counted whatever else is true: a file that is gone, torn or of
		// another boot is no lease.
		switch left := f.lease - f.now; {
		case f.role.Role == Server && f.roleErr == nil:
			// confirmed; see below
		case left <= killBefore:
			return kill, "the lease has ended"
		case left <= termBefore && c.termed == 0:
			return term, "the lease ends"
		}
	}
	why := ""
	switch {
	case f.stop:
		why = "told to end"
	case !f.allowed:
		why = "the node agent does not allow k3s to run any more"
	case f.roleErr == nil && f.role.Role != c.role && !(f.role.Role == Server && (c.role == Candidate || c.role == Joiner)):
		why = fmt.Sprintf("the role changed from %s to %q", c.role, f.role.Role)
	}
	switch {
	case c.termed != 0 && f.now-c.termed > stopTimeout:
		return kill, "k3s did not end in time"
	case why != "" && c.termed == 0:
		return term, why
	}
	return wait, why
}
