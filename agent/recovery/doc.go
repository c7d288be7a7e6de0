// Package recovery is PID 1 of the recovery image. It brings a bare machine
// up (file systems, modules, clock, addresses), shows on every console what
// it is doing, and lets an Enroller prove the machine to the centre until it
// has a certificate. It outlives every outage of network and centre.
//
// It never writes to a disk: no block device is opened in here at all. The
// Enroller hands a machine that is enrolled to agent/install, which writes the
// one disk that a signed order names. DESIGN.md has the reasons, the order of things, and what is left out on purpose.
package recovery
