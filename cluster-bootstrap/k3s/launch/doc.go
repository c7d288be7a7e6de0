// Package launch runs k3s on one node: the launcher (what `muster-node k3s`
// is), the files by which it is told what to run, and the two ways of starting
// and stopping the launcher itself (systemd, direct).
//
// The launcher decides nothing about the cluster. It keeps three rules: one
// k3s process per node, a candidate runs only under a lease, and no start can
// make a new cluster unless it was told so for this very start. It never looks
// at arguments of processes and never judges by an exit code.
package launch
