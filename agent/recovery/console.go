package recovery

import (
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent"
)

// console is one terminal. A goroutine of its own writes to it, since a
// serial line with flow control may stall for ever.
type console struct {
	name string
	// screen is true for a virtual terminal: it shows the screen; all others
	// get lines.
	screen bool
	width  int
	out    chan string
	last   string // the screen shown last
}

// consoles is every console the kernel writes to.
type consoles struct {
	mu   sync.Mutex
	all  []*console
	busy sync.WaitGroup
}

// activeConsoles parses /sys/class/tty/console/active: names, blank
// separated. At most eight are used; none means /dev/console.
func activeConsoles(b []byte) []string {
	var out []string
	for _, f := range strings.Fields(string(b)) {
		if len(out) < 8 && len(f) < 32 && !strings.ContainsAny(f, "/.") {
			out = append(out, f)
		}
	}
	if len(out) == 0 {
		out = []string{"console"}
	}
	return out
}

// isScreen tells virtual terminals (tty0, tty1) from serial lines (ttyS0,
// hvc0) and the rest.
func isScreen(name string) bool {
	n, ok := strings.CutPrefix(name, "tty")
	return ok && n != "" && strings.Trim(n, "0123456789") == ""
}

// openConsoles opens what can be opened; none is no error, the machine works
// without anybody looking.
func openConsoles() *consoles {
	active, _ := readCapped("/sys/class/tty/console/active", 4096)
	c := &consoles{}
	for _, name := range activeConsoles(active) {
		f, err := os.OpenFile("/dev/"+name, os.O_WRONLY|unix.O_NOCTTY, 0)
		if err != nil {
			continue
		}
		t := &console{name: name, screen: isScreen(name), width: 80, out: make(chan string, 64)}
		if t.screen {
			if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 0 {
				t.width = min(int(ws.Col), 132)
			}
			// Reset, no blanking, no cursor (console_codes(4)).
			c.send(t, "\033c\033[9;0]\033[?25l")
		} else {
			c.send(t, "\n") // the firmware may have stopped in mid-line
		}
		c.all = append(c.all, t)
		go c.write(t, f)
	}
	return c
}

func (c *consoles) write(t *console, f *os.File) {
	for s := range t.out {
		_, _ = f.WriteString(s) // nobody to tell
		c.busy.Done()
	}
}

// send queues s and drops it when the console is stuck.
func (c *consoles) send(t *console, s string) {
	c.busy.Add(1)
	select {
	case t.out <- s:
	default:
		c.busy.Done()
	}
}

// line prints one line on every console.
func (c *consoles) line(s string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.all {
		c.send(t, s+"\n")
		t.last = "" // a screen must be drawn anew
	}
}

// draw shows v on the screens where it changed something.
func (c *consoles) draw(v agent.View) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.all {
		if !t.screen {
			continue
		}
		if s := agent.Screen(v, t.width); s != t.last {
			t.last = s
			c.send(t, "\033[H\033[J"+s+"\n")
		}
	}
}

// flush waits until everything is written, at most for d.
func (c *consoles) flush(d time.Duration) {
	done := make(chan struct{})
	go func() { c.busy.Wait(); close(done) }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// quiet keeps kernel messages off the consoles (syslog(2), action 8), all
// but emergencies: they would scramble the screen. They stay in the ring
// buffer. Our own details go there too.
func quiet() *slog.Logger {
	const consoleLevel = 8
	_, _, _ = unix.Syscall(unix.SYS_SYSLOG, consoleLevel, 0, 1)
	_ = os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on\n"), 0)
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(kmsg{f}, &slog.HandlerOptions{ReplaceAttr: noTime}))
}

// kmsg writes one record a call; the kernel takes at most about 1000 bytes.
type kmsg struct{ f *os.File }

func (k kmsg) Write(p []byte) (int, error) {
	if _, err := fmt.Fprintf(k.f, "<6>muster-node: %s", p[:min(len(p), 900)]); err != nil {
		return 0, err
	}
	return len(p), nil
}

func noTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{} // the kernel stamps it
	}
	return a
}
