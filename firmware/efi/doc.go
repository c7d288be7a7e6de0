// Package efi is the node's hand on what its firmware reads: the files of the
// EFI system partition, and the variables that say what is started. It does
// what firmware.PlanUpdate, firmware.PlanInstall and firmware.PlanBootOrder
// decided, one durable step at a time.
//
// A FAT has no journal. A file is therefore first written under a name that the
// loader passes over, made durable, read back and compared; only then it gets
// its name, and that too is made durable before anybody is told.
//
// It mounts nothing and finds no disk: firmware/disk does.
package efi
