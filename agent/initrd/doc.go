// Package initrd is PID 1 of a slot's initrd. It finds the slot that belongs to
// the command line it was started with, puts dm-verity over it, and hands over
// to the system inside. Whatever goes wrong ends in a restart of the machine
// within a bounded time, so that the boot loader can choose again.
//
// What it reads from disks was written by anybody: a slot is what has the UUIDs
// of the signed command line, and its bytes count only as far as the root hash
// vouches for them.
package initrd
