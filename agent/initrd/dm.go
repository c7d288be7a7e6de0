package initrd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The device mapper's interface, linux/dm-ioctl.h: one structure of 312 bytes
// for all calls, followed by what the call needs.
const (
	dmHeader   = 312
	dmCreate   = 3
	dmRemove   = 4
	dmSuspend  = 6
	dmLoad     = 9
	dmReadOnly = 1
	dmSector   = 512
)

// dmRequest is the bytes of a call.
func dmRequest(name, uuid string, flags uint32, targets int, data []byte) []byte {
	b := make([]byte, dmHeader+len(data))
	le := binary.LittleEndian
	le.PutUint32(b, 4) // version 4.0.0: what every kernel since 2.6 takes
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], dmHeader)
	le.PutUint32(b[20:], uint32(targets))
	le.PutUint32(b[28:], flags)
	copy(b[48:48+127], name)
	copy(b[176:176+128], uuid)
	copy(b[dmHeader:], data)
	return b
}

// dmTarget is one line of a table over length sectors.
func dmTarget(length uint64, kind, params string) []byte {
	size := (40 + len(params) + 1 + 7) &^ 7
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint64(b[8:], length)
	le.PutUint32(b[20:], uint32(size))
	copy(b[24:39], kind)
	copy(b[40:], params)
	return b
}

func dmCall(control *os.File, command uintptr, request []byte) error {
	// _IOWR(0xfd, command, struct dm_ioctl)
	number := uintptr(3)<<30 | dmHeader<<16 | 0xfd<<8 | command
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), number, uintptr(unsafe.Pointer(&request[0])))
	if errno != 0 {
		return errno
	}
	return nil
}

// verityTable is the dm-verity line for a candidate
// (Documentation/admin-guide/device-mapper/verity.rst). The hash tree's
// superblock takes its first block.
func verityTable(c candidate, r root, salt string, panicOnError bool) string {
	t := fmt.Sprintf("1 %s %s %d %d %d 1 sha256 %s %s", c.root.device, c.verity.device, blockSize, blockSize, r.size/blockSize, r.hash, salt)
	if panicOnError {
		t += " 1 panic_on_corruption"
	}
	return t
}

// openVerity makes the device "root" and returns its node.
func openVerity(c candidate, r root, salt string, panicOnError bool) (string, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("initrd: open device mapper: %w", err)
	}
	defer control.Close()
	const name = "root"
	// The form of veritysetup, so that tools know what it is.
	uuid := "CRYPT-VERITY-" + string(bytes.ReplaceAll([]byte(r.verityUUID), []byte("-"), nil)) + "-root"
	create := dmRequest(name, uuid, dmReadOnly, 0, nil)
	if err := dmCall(control, dmCreate, create); err != nil {
		return "", fmt.Errorf("initrd: create verity device: %w", err)
	}
	remove := func(err error) (string, error) {
		return "", errors.Join(err, dmCall(control, dmRemove, dmRequest(name, "", 0, 0, nil)))
	}
	table := dmTarget(uint64(r.size/dmSector), "verity", verityTable(c, r, salt, panicOnError))
	if err := dmCall(control, dmLoad, dmRequest(name, "", dmReadOnly, 1, table)); err != nil {
		return remove(fmt.Errorf("initrd: load verity table: %w", err))
	}
	// "Suspend" without its flag resumes: the table goes live.
	resume := dmRequest(name, "", 0, 0, nil)
	if err := dmCall(control, dmSuspend, resume); err != nil {
		return remove(fmt.Errorf("initrd: start verity device: %w", err))
	}
	dev := binary.LittleEndian.Uint64(resume[40:])
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(dev)), nil
}

// closeVerity removes the device again, to try another slot.
func closeVerity() error {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	return dmCall(control, dmRemove, dmRequest("root", "", 0, 0, nil))
}
