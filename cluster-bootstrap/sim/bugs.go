package sim

import (
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Bug is a planted bug: a planner, or an edge around it, that does one thing
// wrong. The simulator must find each of them.
type Bug struct {
	Name string
	// Kind is the kind of run that finds it soonest.
	Kind string
	// Observe changes what the planner sees.
	Observe func(View, *cb.Observation)
	// Decide changes what it decided.
	Decide func(View, cb.Observation, cb.State, []cb.Action) (cb.State, []cb.Action)
	// Material changes the answer to who asks for join material.
	Material func(cb.Observation, fleet.NodeID, cb.Role, bool) bool
	// Edge switches on a fault inside the simulated edge.
	Edge string
}
