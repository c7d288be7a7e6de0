// Package disk writes the disk of a node: partition table, an empty ESP, the
// raw partitions of a slot, the record on meta. What goes where is decided in
// package firmware; here every write is made durable and read back.
//
// Two rules hold for everything in it. It writes only to the device that it
// was given open, so that a second disk cannot be touched by a wrong name.
// And it opens a disk for itself: one that somebody has mounted is refused.
package disk
