package tftp_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/tftp"
)

func TestMain(m *testing.M) { netlab.Main(m) }

const name = "amd64/recovery.efi"

// one is a source with one file. Opened counts, and gate, if set, holds
// readers back.
type one struct {
	path string
	gate chan struct{}
	mu   sync.Mutex
	asks []string
	open int
}

type gated struct {
	*os.File
	o *one
}

func (g gated) Read(b []byte) (int, error) {
	if g.o.gate != nil {
		<-g.o.gate
	}
	return g.File.Read(b)
}

func (g gated) Close() error {
	g.o.mu.Lock()
	g.o.open--
	g.o.mu.Unlock()
	return g.File.Close()
}

func (o *one) Open(n string) (tftp.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.asks = append(o.asks, n)
	if n != name {
		return nil, fs.ErrNotExist
	}
	f, err := os.Open(o.path)
	if err != nil {
		return nil, err
	}
	o.open++
	return gated{f, o}, nil
}

type rig struct {
	lan  *netlab.LAN
	src  *one
	data []byte
	s    *tftp.Server
	mu   sync.Mutex
	got  []tftp.Progress
	stop func()
}

func (r *rig) progress() []tftp.Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]tftp.Progress(nil), r.got...)
}

// ends waits for n transfers to end and returns how.
func (r *rig) ends(t testing.TB, n int) []tftp.Progress {
	t.Helper()
	var out []tftp.Progress
	netlab.Eventually(t, 20*time.Second, fmt.Sprintf("%d transfers end", n), func() bool {
		out = nil
		for _, p := range r.progress() {
			if p.Done || p.Probe || p.Err != nil {
				out = append(out, p)
			}
		}
		return len(out) >= n
	})
	return out
}

var boothost = netip.MustParseAddr("10.77.0.1")

func newRig(t testing.TB, size int, edit func(*tftp.Config)) *rig {
	t.Helper()
	r := &rig{lan: netlab.NewLAN(t, "10.77.0.1/24")}
	r.data = make([]byte, size)
	for i := range r.data {
		r.data[i] = byte(i * 31 >> 5)
	}
	r.src = &one{path: filepath.Join(t.TempDir(), "f")}
	if err := os.WriteFile(r.src.path, r.data, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := tftp.Config{Interface: r.lan.Name, Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}, Source: r.src,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Progress: func(p tftp.Progress) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.got = append(r.got, p)
		}}
	if edit != nil {
		edit(&cfg)
	}
	s, err := tftp.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.s = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

func (r *rig) read(t testing.TB, h *netlab.Host, file string, edit func(*edk2.Client)) (data []byte, err error) {
	t.Helper()
	c := &edk2.Client{Iface: h.Iface, MAC: h.MAC}
	if edit != nil {
		edit(c)
	}
	err = h.Do(func() (err error) {
		data, err = c.TFTPRead(boothost, file)
		return err
	})
	return data, err
}

func TestBlockSizesAndLoss(t *testing.T) {
	r := newRig(t, 300_000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	for _, block := range []int{512, 1024, 1468, 8192} {
		for _, lose := range []int{0, 100} {
			data, err := r.read(t, h, name, func(c *edk2.Client) { c.BlockSize, c.Lose = block, lose })
			if err != nil || !bytes.Equal(data, r.data) {
				t.Errorf("block size %d, losing every %d: %d bytes, %v", block, lose, len(data), err)
			}
		}
	}
}

// The last block of a file that is a multiple of the block size is empty.
func TestSizesAroundABlock(t *testing.T) {
	for _, size := range []int{0, 1, 511, 512, 513, 1024} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := newRig(t, size, nil)
			h := r.lan.Host(t, "10.77.0.30/24")
			data, err := r.read(t, h, name, func(c *edk2.Client) { c.BlockSize = 512 })
			if err != nil || !bytes.Equal(data, r.data) {
				t.Errorf("%d bytes, %v", len(data), err)
			}
		})
	}
}

// Block numbers are 16 bits: beyond 32 MiB at 512 bytes they roll over.
func TestBlockNumbersRollOver(t *testing.T) {
	if testing.Short() {
		t.Skip("34 MB block by block")
	}
	r := newRig(t, 65_600*512, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	data, err := r.read(t, h, name, func(c *edk2.Client) { c.BlockSize = 512 })
	if err != nil || !bytes.Equal(data, r.data) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}

func TestSizeProbeIsNoError(t *testing.T) {
	r := newRig(t, 5000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	var size int
	if err := h.Do(func() (err error) {
		size, err = (&edk2.Client{Iface: h.Iface}).TFTPSize(boothost, name)
		return err
	}); err != nil || size != len(r.data) {
		t.Fatalf("size %d, %v", size, err)
	}
	p := r.ends(t, 1)[0]
	if !p.Probe || p.Err != nil || p.Done || p.Client.String() != "10.77.0.30" {
		t.Errorf("the probe is reported as %+v", p)
	}
	if _, err := r.read(t, h, name, nil); err != nil {
		t.Error(err)
	}
	if p := r.ends(t, 2)[1]; !p.Done || p.Sent != 5000 || p.Size != 5000 {
		t.Errorf("the transfer is reported as %+v", p)
	}
}

func TestBrokenTransferIsAnError(t *testing.T) {
	r := newRig(t, 500_000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	if err := h.Do(func() error { return ask(1, name, "\x00\x05\x00\x03disk full\x00") }); err != nil {
		t.Fatal(err)
	}
	if p := r.ends(t, 1)[0]; p.Err == nil || p.Probe || p.Done {
		t.Errorf("an abort in the middle is reported as %+v", p)
	}
}

// ask sends a request without options, takes n blocks, and then says last.
func ask(n int, file, last string) error {
	c, err := net.ListenUDP("udp4", nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.WriteToUDPAddrPort([]byte("\x00\x01"+file+"\x00octet\x00"), netip.AddrPortFrom(boothost, 69)); err != nil {
		return err
	}
	buf := make([]byte, 2000)
	_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
	for i := range n {
		_, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		out := []byte{0, 4, buf[2], buf[3]}
		if i == n-1 {
			out = []byte(last)
		}
		if _, err := c.WriteToUDPAddrPort(out, from); err != nil {
			return err
		}
	}
	return nil
}

func TestOnlyTheListIsServed(t *testing.T) {
	r := newRig(t, 1000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	for _, n := range []string{name, "/" + name, "//" + name, `\amd64\recovery.efi`} {
		if data, err := r.read(t, h, n, nil); err != nil || !bytes.Equal(data, r.data) {
			t.Errorf("%q: %v", n, err)
		}
	}
	for _, n := range []string{"etc/passwd", "../" + name, "/etc/passwd", "amd64/../amd64/recovery.efi", "amd64//recovery.efi", ".", "..", "/", strings.Repeat("a", 400), "amd64/recovery.efi\n"} {
		if _, err := r.read(t, h, n, nil); err == nil || !strings.Contains(err.Error(), "file not found") {
			t.Errorf("%q: %v", n, err)
		}
	}
	r.src.mu.Lock()
	defer r.src.mu.Unlock()
	for _, n := range r.src.asks {
		if !fs.ValidPath(n) {
			t.Errorf("the source was asked for %q", n)
		}
	}
	if r.s.Refused() != 10 {
		t.Errorf("%d refused", r.s.Refused())
	}
}

func TestWritesAreRefused(t *testing.T) {
	r := newRig(t, 1000, nil)
	h := r.lan.Host(t, "10.77.0.30/24")
	err := h.Do(func() error {
		c, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.WriteToUDPAddrPort([]byte("\x00\x02"+name+"\x00octet\x00"), netip.AddrPortFrom(boothost, 69)); err != nil {
			return err
		}
		buf := make([]byte, 600)
		_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
		n, _, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if n < 4 || buf[1] != 5 {
			return fmt.Errorf("a write is answered with % x", buf[:n])
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(r.src.path); !bytes.Equal(b, r.data) {
		t.Error("the file was changed")
	}
}

func TestStrangersGetNoData(t *testing.T) {
	r := newRig(t, 1000, func(c *tftp.Config) { c.Subnets = []netip.Prefix{netip.MustParsePrefix("10.77.0.128/25")} })
	in, out := r.lan.Host(t, "10.77.0.130/24"), r.lan.Host(t, "10.77.0.30/24")
	if _, err := r.read(t, in, name, nil); err != nil {
		t.Errorf("inside: %v", err)
	}
	if _, err := r.read(t, out, name, nil); err == nil || !strings.Contains(err.Error(), "access violation") {
		t.Errorf("outside: %v", err)
	}
}

func TestTransfersAreBounded(t *testing.T) {
	r := newRig(t, 3000, func(c *tftp.Config) { c.MaxTransfers = 2 })
	gate := make(chan struct{})
	r.src.gate = gate
	hosts := []*netlab.Host{r.lan.Host(t, "10.77.0.31/24"), r.lan.Host(t, "10.77.0.32/24"), r.lan.Host(t, "10.77.0.33/24")}
	errs := make(chan error, 2)
	for _, h := range hosts[:2] {
		go func() {
			_, err := r.read(t, h, name, nil)
			errs <- err
		}()
	}
	netlab.Eventually(t, 3*time.Second, "two are open", func() bool {
		r.src.mu.Lock()
		defer r.src.mu.Unlock()
		return r.src.open == 2
	})
	if _, err := r.read(t, hosts[2], name, nil); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("a third transfer: %v", err)
	}
	close(gate)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	netlab.Eventually(t, 3*time.Second, "the third is served afterwards", func() bool {
		_, err := r.read(t, hosts[2], name, nil)
		return err == nil
	})
	netlab.Eventually(t, 3*time.Second, "files are closed", func() bool {
		r.src.mu.Lock()
		defer r.src.mu.Unlock()
		return r.src.open == 0
	})
}

func TestShutdownLeavesNothing(t *testing.T) {
	before := goleak.IgnoreCurrent()
	r := newRig(t, 3000, nil)
	r.stop()
	goleak.VerifyNone(t, before)
	// The port is free again.
	s, err := tftp.New(tftp.Config{Interface: r.lan.Name, Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}, Source: r.src})
	if err != nil {
		t.Fatal(err)
	}
	_, err = tftp.New(tftp.Config{Interface: r.lan.Name, Subnets: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}, Source: r.src})
	if err == nil || !strings.Contains(err.Error(), "another TFTP server") {
		t.Errorf("a second server on the port: %v", err)
	}
	s.Close()
}

func TestConfig(t *testing.T) {
	_, err := tftp.New(tftp.Config{BlockSize: 7})
	for _, want := range []string{"Source", "Subnets", "block size"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing is said of %s: %v", want, err)
		}
	}
	_, err = tftp.New(tftp.Config{Interface: "nosuch0", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Source: &one{}, Addr: "127.0.0.1:0"})
	if err == nil {
		t.Error("an interface that is not there is taken")
	}
	if errors.Is(err, fs.ErrNotExist) {
		t.Error("odd error")
	}
}

func FuzzClean(f *testing.F) {
	for _, s := range []string{name, "/" + name, `\\amd64\recovery.efi`, ".", "..", "a/../../b", "a\x00b", strings.Repeat("/", 200), ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, ok := tftp.Clean(s)
		if !ok {
			if n != "" {
				t.Fatalf("%q is refused, yet becomes %q", s, n)
			}
			return
		}
		if !fs.ValidPath(n) || n == "." || strings.ContainsAny(n, "\\\x00") || filepath.IsAbs(n) || !filepath.IsLocal(n) {
			t.Fatalf("%q becomes %q", s, n)
		}
		if again, ok := tftp.Clean(n); !ok || again != n {
			t.Fatalf("%q is not stable: %q", n, again)
		}
	})
}
