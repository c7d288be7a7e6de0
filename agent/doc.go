// Package agent is the vocabulary and pure core of what runs on a node: the
// states a machine goes through from power-on to enrolled, the rules for the
// clock, the strict reading of site.json, the picture on the screen, and the
// backoff and heartbeat arithmetic that the rooms beside it share.
//
// It does no I/O and reads no clock. The rooms are recovery (PID 1 of the
// recovery image), recovery/netup (addresses) and facts (hardware).
package agent
