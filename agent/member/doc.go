// Package member is a node's membership in its site: it observes, asks the
// planner, does what the planner says in order, and writes down what must not
// be forgotten before anybody can rely on it. It finds peers, keeps talking to
// them, and tells people what the node does and why it waits.
//
// It decides nothing about the cluster: that is cluster-bootstrap. It starts no
// process and touches no file of k3s: that is cluster-bootstrap/k3s. DESIGN.md
// says which promise is kept where.
package member
