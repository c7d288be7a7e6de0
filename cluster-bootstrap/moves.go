package clusterbootstrap

// moves is the table behind State.MoveTo. The simulator fails when a node
// makes a move that is not here, and its standard run fails when one that is
// here was never made. Removed may follow any state and is not listed.
var moves = map[State][]State{
	Observing:  {Surveying, Founding, Joining, Worker, Candidate, Server, Recovering, Leaving, Waiting},
	Surveying:  {Claiming, Founding, Joining, Waiting},
	Claiming:   {Surveying, Founding, Joining, Waiting},
	Founding:   {Server, Surveying, Joining, Fenced, Waiting},
	Joining:    {Worker, Surveying, Founding, Leaving, Waiting},
	Worker:     {Joining, Candidate, Recovering, Leaving, Waiting},
	Candidate:  {Server, Recovering, Leaving, Waiting},
	Server:     {Observing, Leading, Fenced, Recovering, Leaving, Waiting},
	Leading:    {Server, Recovering, Fenced, Leaving, Waiting},
	Fenced:     {Server, Leading, Leaving, Waiting},
	Recovering: {Observing, Server, Leaving, Waiting},
	Leaving:    {Worker, Founding, Joining, Waiting},
	Waiting:    {Surveying, Claiming, Founding, Joining, Worker, Candidate, Server, Leading, Fenced, Recovering, Leaving},
	Removed:    {},
}
