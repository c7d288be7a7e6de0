package clusterbootstrap

// moves is the table behind State.MoveTo. The simulator fails when a node
// makes a move that is not here, and its standard run fails when one that is
// here was never made. Any state but Removed may be followed by Removed.
var moves = map[State][]State{
	Observing:  {Surveying, Founding, Joining, Worker, Candidate, Server, Leading, Recovering, Leaving, Waiting, Removed},
	Surveying:  {Claiming, Joining, Waiting, Removed},
	Claiming:   {Surveying, Founding, Joining, Waiting, Removed},
	Founding:   {Server, Surveying, Joining, Fenced, Waiting, Removed},
	Joining:    {Worker, Surveying, Waiting, Removed},
	Worker:     {Candidate, Leaving, Waiting, Removed},
	Candidate:  {Server, Leaving, Waiting, Removed},
	Server:     {Leading, Fenced, Recovering, Leaving, Observing, Waiting, Removed},
	Leading:    {Server, Recovering, Fenced, Waiting, Removed},
	Fenced:     {Server, Leaving, Waiting, Removed},
	Recovering: {Server, Leaving, Waiting, Removed},
	Leaving:    {Worker, Joining, Waiting, Removed},
	Waiting: {Surveying, Claiming, Founding, Joining, Worker, Candidate, Server, Leading, Fenced, Recovering, Leaving,
		Removed},
	Removed: {},
}
