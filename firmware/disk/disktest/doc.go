// Package disktest holds disks in memory for tests: every write of a sector is
// recorded with the flushes between, so that a test can look at what a power
// cut would have left, at each point and with the writes since the last flush
// arrived in any choice. FAT puts a FAT32 on such a disk, in the form in which
// firmware/efi takes an ESP.
package disktest
