// Package ether is an Ethernet switch in user space, with bad cables: frames
// between its ports can be delayed, lost, doubled, held back, or not let
// through at all, each direction by itself, while it runs.
//
// A port is anything that reads and writes one frame per call: a tap device
// in the lab, a pipe in tests. Which frame suffers is decided by a generator
// of random numbers per pair of ports, so the n-th frame from A to B meets
// the same fate in every run with the same seed, whatever else goes on.
package ether
