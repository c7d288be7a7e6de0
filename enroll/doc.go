// Package enroll is the pure core of enrollment: how an unproven machine
// becomes a node. It defines the transcript that both TPM statements are
// about, the digest that names evidence, the life of a request (File,
// Approve, Reject, Release, Quarantine, Expire, Issue) and the policy that
// says which verdicts a person may approve.
//
// It does no I/O and reads no clock. The rooms beside it speak the protocol:
// client on the node, service at the centre. DESIGN.md says why things are
// as they are.
package enroll
