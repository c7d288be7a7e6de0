// Package k3s is the edge between the planner and the k3s of this node: config
// and token files by role, what k3s says of itself and of the cluster, and the
// actions of the planner that touch k3s. Kubernetes is spoken to by plain REST.
//
// Whatever is judged, is judged by /db/info, by objects and by files, never by
// an exit code. Running the process is in package launch. What this package
// deliberately leaves out is in DESIGN.md.
package k3s
