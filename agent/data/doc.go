// Package data makes, unlocks and mounts the data partition: the only place of
// a node that remembers anything but the signed system. It is encrypted with
// LUKS; the TPM releases the key to a machine in the same state of Secure
// Boot (PCR 7), and a recovery key, sealed to the tenant's escrow key, does so
// for everybody else (docs/adr/0013).
//
// Inspect and Decide are pure: what is on the partition, and what to do about
// it. A partition that we did not make, or that another node made, is never
// touched. One that was begun and never finished is made anew: its commit
// point is the last step, so that nothing can have been stored in it.
//
// cryptsetup, systemd-cryptenroll, systemd-cryptsetup, mkfs.ext4 and e2fsck do
// the work. Keys go to them by standard input or an open file, never by
// arguments.
package data
