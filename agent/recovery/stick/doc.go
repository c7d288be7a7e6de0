// Package stick adds a machine to the list on the medium it was started from:
// what an image for a warehouse does. It is the only code of the recovery
// image that opens a block device, and it runs only in an image that was built
// to scan.
//
// Which medium that is must not be guessed, since every other disk in the
// machine is somebody's. Three things have to agree: the firmware (by the
// stub's variable LoaderDevicePartUUID) names a partition; exactly one disk
// has a partition of that name; and that name follows from the program on it
// (firmware.MediumOf), so that it is a medium that our image builder made, and
// not a disk onto which somebody copied the program. With any doubt nothing is
// written, and the screen says why.
//
//	firmware's partition --> the disks' GPTs --> one? --> read-only look --> append --> look again
//
// The list is only ever appended to: on FAT that leaves what was there alone,
// whenever the stick is pulled out. What is written is read back from the
// stick before the screen says DONE.
package stick
