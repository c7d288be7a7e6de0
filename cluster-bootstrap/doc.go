// Package clusterbootstrap decides how the nodes of a site become one k3s
// cluster and stay one: who founds it, who joins, when two workers become
// servers, and what happens when a part of that fails half-way.
//
// It is a pure function. Plan takes what a node knows and returns the state
// the node is in and what it should do next; Answer* functions say what a node
// answers to its peers. Nothing is remembered between two calls but what the
// caller puts into the next Observation: the disk, the peers, k3s itself.
//
// Left out on purpose: talking to anybody, k3s' files, verifying signatures
// and quotes (the caller hands over documents only after that), and every
// decision that only a person may take. DESIGN.md has the reasons.
package clusterbootstrap
