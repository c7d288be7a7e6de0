// Package host runs many nodes on one Linux host: each node is a set of
// namespaces (network, mount, UTS, IPC, PID) with a disk and a TPM of its own
// and one cable into our Ethernet switch. The programs in it are the real
// ones; what a node lacks is a kernel and a firmware of its own.
//
// Losing power is modelled as far as a living host allows: the cable goes
// dark, the disk's file system is shut down without a flush (what was not
// synced is gone), and every process of the node, TPM included, is killed.
package host
