package kmod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Event is one message of the kernel about a device.
type Event struct {
	Action, Subsystem, Modalias, Devname string
}

// parseUevent reads "ACTION@DEVPATH" NUL "KEY=VALUE" NUL ... (kernel
// lib/kobject_uevent.c). Other senders' forms give ok == false.
func parseUevent(b []byte) (e Event, ok bool) {
	for i, f := range bytes.Split(b, []byte{0}) {
		if i == 0 {
			if !bytes.Contains(f, []byte("@")) {
				return e, false
			}
			continue
		}
		k, v, found := strings.Cut(string(f), "=")
		if !found {
			continue
		}
		switch k {
		case "ACTION":
			e.Action = v
		case "SUBSYSTEM":
			e.Subsystem = v
		case "MODALIAS":
			e.Modalias = v
		case "DEVNAME":
			e.Devname = v
		}
	}
	return e, e.Action != ""
}

// Listen opens the kernel's event socket. Open it before coldplug, so
// that no device falls between the two.
func Listen() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return -1, fmt.Errorf("kmod: open uevents: %w", err)
	}
	// Best effort: thousands of events come at once when buses are scanned.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	tv := unix.NsecToTimeval(int64(time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("kmod: open uevents: %w", err)
	}
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("kmod: open uevents: %w", err)
	}
	return fd, nil
}

// Read calls handle for each event until ctx ends. overrun is called
// when the kernel had to drop some.
func Read(ctx context.Context, fd int, handle func(Event), overrun func()) error {
	buf := make([]byte, 16<<10)
	for ctx.Err() == nil {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			overrun()
			continue
		case err != nil:
			return fmt.Errorf("kmod: read uevents: %w", err)
		}
		// Only the kernel has port 0: processes may not pose as it.
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue
		}
		if e, ok := parseUevent(buf[:n]); ok {
			handle(e)
		}
	}
	return ctx.Err()
}
