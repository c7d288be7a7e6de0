package server_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

func TestMain(m *testing.M) { netlab.Main(m) }

// recorder keeps events.
type recorder struct {
	mu     sync.Mutex
	events []pxe.Event
}

func (r *recorder) Event(e pxe.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *recorder) all() []pxe.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]pxe.Event(nil), r.events...)
}

// has reports whether an event of the step contains the text.
func (r *recorder) has(step pxe.State, text string) bool {
	for _, e := range r.all() {
		if e.Step == step && strings.Contains(e.Text, text) {
			return true
		}
	}
	return false
}

func (r *recorder) alarm(text string) bool {
	for _, e := range r.all() {
		if e.Alarm && strings.Contains(e.Text, text) {
			return true
		}
	}
	return false
}

func (r *recorder) dump(t testing.TB) {
	for _, e := range r.all() {
		t.Log(e)
	}
}

func as(s pxe.Standing) server.PolicyFunc {
	return func(context.Context, pxe.Machine) server.Decision { return server.Decision{Standing: s} }
}

// image writes a recovery image of n bytes.
func image(t testing.TB, n int) (dir string, data []byte) {
	t.Helper()
	data = make([]byte, n)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, server.ImageName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, data
}

// start runs a server on the LAN until the test ends.
func start(t testing.TB, cfg server.Config) (*server.Server, *recorder) {
	t.Helper()
	rec := &recorder{}
	cfg.Events = rec
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if cfg.WatchEvery == 0 {
		cfg.WatchEvery = -1
	}
	if cfg.ProbeWait == 0 {
		cfg.ProbeWait = 50 * time.Millisecond
	}
	if cfg.StateDir == "" {
		cfg.StateDir = t.TempDir()
	}
	s, err := server.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if t.Failed() {
			rec.dump(t)
		}
	})
	return s, rec
}

func full(t testing.TB, lan *netlab.LAN, dir string) server.Config {
	r, err := server.ParseRange("10.77.0.100-10.77.0.199")
	if err != nil {
		t.Fatal(err)
	}
	return server.Config{Interface: lan.Name, Mode: pxe.ModeFull, Range: r, Images: server.Dir(dir), Policy: as(pxe.Unknown)}
}

func firmware(h *netlab.Host) *edk2.Client {
	return &edk2.Client{Iface: h.Iface, MAC: h.MAC, Arch: 7, Wait: []time.Duration{400 * time.Millisecond, 400 * time.Millisecond, 400 * time.Millisecond}}
}

func TestFullModeBootsByTFTP(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, 3_000_001)
	s, rec := start(t, full(t, lan, dir))
	h := lan.Host(t)
	var res edk2.Result
	err := h.Do(func() (err error) {
		res, err = firmware(h).Boot()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if res.Kind != "dhcp-pxe10" || res.Rounds != 1 || !bytes.Equal(res.Data, data) {
		t.Errorf("kind %s, rounds %d, %d bytes", res.Kind, res.Rounds, len(res.Data))
	}
	if res.Addr.String() != "10.77.0.100" {
		t.Errorf("address %s, want the first of the range", res.Addr)
	}
	netlab.Eventually(t, 2*time.Second, "served event", func() bool { return rec.has(pxe.StateServed, "sent by tftp") })
	for _, step := range []pxe.State{pxe.StateOffered, pxe.StateBound, pxe.StateFetching} {
		if !rec.has(step, "") {
			t.Errorf("no event for step %s", step)
		}
	}
	if m := s.Machines(); len(m) != 1 || m[0].State != pxe.StateServed || m[0].Addr != res.Addr {
		t.Errorf("machines: %+v", m)
	}
}
