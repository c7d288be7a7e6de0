// Package lab runs whole scenarios on virtual machines, on a network of their
// own that the host never sees: it makes namespaces, bridge and taps, starts
// machines and muster's own services in them, keeps every log and packet, and
// leaves nothing behind, even when it is killed.
//
// What a scenario does and expects is in lab/scenario, what a machine is in
// lab/machine. DESIGN.md says why it is built this way.
package lab
