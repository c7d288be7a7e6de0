package recovery

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// system is what the machine does to the kernel; tests replace it.
type system struct {
	now     func() time.Time
	setTime func(time.Time) error
	restart func()
	// powerOff ends a machine that has nothing more to do.
	powerOff func()
}

func realSystem(log *slog.Logger) system {
	return system{now: time.Now, setTime: func(t time.Time) error { return setTime(t, log) }, restart: restart, powerOff: powerOff}
}

// setTime sets the kernel's clock and, as well as it goes, the battery's, so
// that the firmware of the next boot is right too.
func setTime(t time.Time, log *slog.Logger) error {
	tv := unix.NsecToTimeval(t.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("recovery: set clock: %w", err)
	}
	f, err := os.OpenFile("/dev/rtc0", os.O_RDONLY, 0)
	if err != nil {
		log.Info("battery clock not set", "err", err)
		return nil
	}
	defer f.Close()
	u := t.UTC()
	rt := unix.RTCTime{
		Sec: int32(u.Second()), Min: int32(u.Minute()), Hour: int32(u.Hour()),
		Mday: int32(u.Day()), Mon: int32(u.Month()) - 1, Year: int32(u.Year()) - 1900,
	}
	if err := unix.IoctlSetRTCTime(int(f.Fd()), &rt); err != nil {
		log.Info("battery clock not set", "err", err)
	}
	return nil
}

// restart ends the machine. Should the kernel refuse, PID 1 exits: that is a
// kernel panic, and panic=10 on the command line restarts the machine.
func restart() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	os.Exit(1)
}

// powerOff switches the machine off; one that cannot do that restarts.
func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	restart()
}

// watchSignals turns Ctrl-Alt-Del (SIGINT once CAD is off) and SIGTERM into a
// call of stop, and reaps orphans: nothing here starts processes, but the
// kernel hands every orphan to PID 1.
func watchSignals(ctx context.Context, stop func(why string)) error {
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	sigs := make(chan os.Signal, 16)
	signal.Notify(sigs, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGCHLD, unix.SIGHUP)
	defer signal.Stop(sigs)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-sigs:
			switch s {
			case unix.SIGCHLD:
				reap()
			case unix.SIGHUP: // a terminal went away: no concern of ours
			case unix.SIGINT:
				stop("Ctrl-Alt-Del")
			default:
				stop("signal: " + s.String())
			}
		}
	}
}

func reap() {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if pid <= 0 || err != nil && err != unix.EINTR {
			return
		}
	}
}

// readCapped reads at most limit bytes of a file.
func readCapped(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
