package launch

import (
	"context"
	"time"
)

// Control starts and stops the launcher. Both implementations pass one
// conformance suite.
type Control interface {
	// Start makes the launcher run and returns when it does; whether k3s
	// comes up is in its Status. Starting a launcher that runs is no error.
	Start(ctx context.Context) error
	// Stop ends launcher and k3s in order and returns when both are gone.
	// Containers stay. Stopping what does not run is no error. It may take
	// minutes: k3s ends when it wants to.
	Stop(ctx context.Context) error
	// Running reports whether the launcher runs.
	Running(ctx context.Context) (bool, error)
}

// Status is what the launcher says of itself and of k3s, in StatusFile.
// Times are CLOCK_BOOTTIME.
type Status struct {
	Launcher Process       `json:"launcher"`
	State    State         `json:"state"`
	Reason   string        `json:"reason,omitempty"` // why k3s does not run
	Role     string        `json:"role,omitempty"`   // of the k3s process
	Init     bool          `json:"init,omitempty"`
	K3s      *Process      `json:"k3s,omitempty"`
	Guard    int           `json:"guard,omitempty"`   // PID of a candidate's guard
	Started  time.Duration `json:"started,omitempty"` // when K3s was started
	Ready    bool          `json:"ready,omitempty"`   // k3s said READY=1
	Starts   int           `json:"starts"`
	LastExit string        `json:"last_exit,omitempty"` // for people; nothing is judged by it
}

// State is where the launcher stands.
type State string

const (
	// Starting: the launcher has not looked yet.
	Starting State = "starting"
	// Refused: k3s may not be started as things are; Reason says why. The
	// launcher looks again all the time.
	Refused State = "refused"
	// Running: k3s runs.
	Running State = "running"
	// Pausing: k3s ended by itself and is started again after a pause.
	Pausing State = "pausing"
	// Stopping: k3s was told to end.
	Stopping State = "stopping"
	// Gone: the launcher has ended, and k3s before it.
	Gone State = "gone"
)
