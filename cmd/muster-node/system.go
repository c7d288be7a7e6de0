package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// setSystemClock sets the kernel's clock.
func setSystemClock(t time.Time) error {
	tv := unix.NsecToTimeval(t.UnixNano())
	return unix.Settimeofday(&tv)
}

// watchdog tells systemd that the agent is up, and, while alive says so, that
// it still is. Without systemd it does nothing.
func watchdog(ctx context.Context, alive func() bool, log *slog.Logger) error {
	if err := notify("READY=1"); err != nil {
		log.Warn("systemd not told", "err", err)
	}
	defer notify("STOPPING=1") //nolint:errcheck // it is over anyway
	every := watchdogEvery()
	if every <= 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if !alive() {
			log.Error("the loop is stuck; the watchdog will end the agent")
			continue
		}
		if err := notify("WATCHDOG=1"); err != nil {
			log.Warn("systemd not told", "err", err)
		}
	}
}

// watchdogEvery is half of what systemd waits for (sd_watchdog_enabled(3)).
func watchdogEvery() time.Duration {
	us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if pid := os.Getenv("WATCHDOG_PID"); err != nil || us <= 0 || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return time.Duration(us) * time.Microsecond / 2
}

// notify sends a message of sd_notify(3).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	if strings.HasPrefix(path, "@") {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	return nil
}

// slotOf reads which slot of the disk runs and the root hash of its file
// system from the kernel's command line, which is part of the signed image.
func slotOf() (slot, digest string) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil || len(b) > 64<<10 {
		return "", ""
	}
	for _, w := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(w, "muster.slot="); ok && (v == "a" || v == "b") {
			slot = v
		}
		if v, ok := strings.CutPrefix(w, "roothash="); ok {
			if _, err := hex.DecodeString(v); err == nil && len(v) == 64 {
				digest = v
			}
		}
	}
	return slot, digest
}

// bootOf is how the machine says it came up; others judge it by a quote.
func bootOf(secureBoot bool, eventLog func() ([]byte, error)) string {
	if secureBoot {
		return "enforced"
	}
	if b, err := eventLog(); err == nil && len(b) > 0 {
		return "measured"
	}
	return "unknown"
}
