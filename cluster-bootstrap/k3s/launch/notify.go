package launch

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"unicode"
)

// message is what is taken from k3s' sd_notify.
type message struct {
	ready  bool
	status string
}

// parseNotify reads a datagram of sd_notify(3). Only READY and STATUS are
// taken: k3s is not the main process of the unit.
func parseNotify(b []byte) (m message) {
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimRight(line, "\n"), "=")
		switch k {
		case "READY":
			m.ready = m.ready || v == "1"
		case "STATUS":
			v = strings.Map(func(r rune) rune {
				if !unicode.IsPrint(r) {
					return -1
				}
				return r
			}, strings.ToValidUTF8(v, ""))
			m.status = v[:min(len(v), 200)]
		}
	}
	return m
}

// notifier receives k3s' messages and passes them to the service manager.
type notifier struct {
	conn     *net.UnixConn
	path     string
	messages chan message
	up       *net.UnixConn // nil: no service manager
	watched  bool
	log      *slog.Logger
}

func newNotifier(path string, log *slog.Logger) (*notifier, error) {
	n := &notifier{path: path, messages: make(chan message, 16), watched: os.Getenv("WATCHDOG_USEC") != "", log: log}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("launch: notify socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("launch: notify socket: %w", err)
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		// A path longer than 107 bytes, for example: nobody hears that k3s is
		// ready, and that is all.
		log.Warn("listen to k3s", "err", err)
		return n, nil
	}
	n.conn = c
	if up := os.Getenv("NOTIFY_SOCKET"); up != "" {
		if strings.HasPrefix(up, "@") {
			up = "\x00" + up[1:]
		}
		if n.up, err = net.DialUnix("unixgram", nil, &net.UnixAddr{Name: up, Net: "unixgram"}); err != nil {
			log.Warn("reach the service manager", "err", err)
		}
	}
	go n.receive()
	return n, nil
}

func (n *notifier) receive() {
	b := make([]byte, 4096)
	for {
		k, err := n.conn.Read(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		select {
		case n.messages <- parseNotify(b[:k]):
		default: // the launcher is busy with a flood; readiness is said again
		}
	}
}

func (n *notifier) env() string {
	if n.conn == nil {
		return ""
	}
	return "NOTIFY_SOCKET=" + n.path
}

func (n *notifier) send(s string) {
	if n.up == nil {
		return
	}
	if _, err := n.up.Write([]byte(s)); err != nil {
		n.log.Warn("tell the service manager", "err", err)
	}
}

// alive tells the service manager's watchdog that the loop goes round.
func (n *notifier) alive() {
	if n.watched {
		n.send("WATCHDOG=1")
	}
}

// Close ends receiving.
func (n *notifier) Close() {
	if n.conn != nil {
		_ = n.conn.Close()
	}
	if n.up != nil {
		_ = n.up.Close()
	}
}
