package clusterbootstrap

// moves is the table behind State.MoveTo. The simulator fails when a run makes
// a move that is not here, and when a standard run never makes one that is.
var moves = map[State][]State{}
