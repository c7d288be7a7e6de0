package recovery

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent"
)

// Watchdog times. The hardware gets four periods; the heart may miss three.
const (
	petPeriod       = 10 * time.Second
	heartPatience   = 30 * time.Second
	hardwareTimeout = 60 // seconds
)

// watchdog pets the hardware watchdog while the main loop beats. It keeps
// looking for a device, since drivers come with modules. With no device, or
// one that does nothing, it restarts the machine itself when the heart has
// stopped for four times its patience.
type watchdog struct {
	heart *agent.Heartbeat
	// uptime is a clock that never jumps.
	uptime func() time.Duration
	open   func() (*os.File, error)
	reboot func(why string)
	log    *slog.Logger
}

// openWatchdog arms the first watchdog. It is never disarmed: while the
// machine goes down it guards that too.
func openWatchdog() (*os.File, error) {
	f, err := os.OpenFile("/dev/watchdog0", os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	// WDIOC_SETTIMEOUT, linux/watchdog.h. A driver with a fixed time refuses.
	_ = unix.IoctlSetPointerInt(int(f.Fd()), 0xc0045706, hardwareTimeout)
	return f, nil
}

func (w *watchdog) run(ctx context.Context) error {
	t := time.NewTicker(petPeriod)
	defer t.Stop()
	var dev *os.File
	for {
		if dev == nil {
			if f, err := w.open(); err == nil {
				dev = f
				w.log.Info("watchdog armed", "device", f.Name())
			}
		}
		alive, age := w.heart.Alive(w.uptime())
		switch {
		case alive && dev != nil:
			if _, err := dev.Write([]byte{0}); err != nil {
				w.log.Warn("watchdog", "err", err)
			}
		case age > 4*heartPatience:
			w.reboot(fmt.Sprintf("the main loop has not answered for %s", age.Round(time.Second)))
		}
		select {
		case <-ctx.Done():
			return ctx.Err() // dev stays open and armed
		case <-t.C:
		}
	}
}
