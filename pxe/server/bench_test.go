package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/muster-edge/muster/internal/dev/benchrow"
	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

const pairs = 5

// peerProgram finds a peer; atftpd conflicts with tftpd-hpa as a package, so
// it is unpacked beside (internal/dev/prerequisites bench).
func peerProgram(t testing.TB, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, os.Getenv("MUSTER_BENCH_DIR") + "/../peers/usr/sbin/" + name} {
		if full, err := exec.LookPath(p); err == nil {
			return full
		}
	}
	return ""
}

// daemon starts a peer in the boot host's namespace and returns its process.
func daemon(t testing.TB, name string, args ...string) *os.Process {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%s:\n%s", name, b)
		}
		log.Close()
	})
	return cmd.Process
}

// cpu is the processor time of a process and its children, in seconds.
func cpu(t testing.TB, pid int) float64 {
	t.Helper()
	var sum float64
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, s := range stats {
		b, err := os.ReadFile(s)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		id, _ := strconv.Atoi(strings.Split(s, "/")[2])
		parent, _ := strconv.Atoi(f[1])
		if id == pid || parent == pid {
			u, _ := strconv.ParseFloat(f[11], 64)
			k, _ := strconv.ParseFloat(f[12], 64)
			sum += (u + k) / 100
		}
	}
	return sum
}

func ownCPU() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// TestBenchTFTP: one machine fetches 2 MB, by lines of 0.2 and 5 ms.
func TestBenchTFTP(t *testing.T) {
	part := benchrow.Begin(t, "tftp")
	lan := netlab.NewLAN(t, "10.77.0.1/24", "10.77.0.2/24", "10.77.0.3/24")
	dir, data := image(t, 2<<20)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(dir, 0o755))
	must(os.Chmod(filepath.Dir(dir), 0o755))
	must(os.Chmod(filepath.Join(dir, server.ImageName), 0o644))
	cfg := full(t, lan, dir)
	cfg.Mode = pxe.ModeOff
	cfg.Address = netip.MustParseAddr("10.77.0.1")
	cfg.TFTPAddr = "10.77.0.1:69"
	start(t, cfg)
	peers := map[string]netip.Addr{}
	if p := peerProgram(t, "in.tftpd"); p != "" {
		daemon(t, p, "-L", "-a", "10.77.0.2:69", "-s", dir)
		peers["tftpd-hpa 5.2"] = netip.MustParseAddr("10.77.0.2")
	}
	if p := peerProgram(t, "atftpd"); p != "" {
		daemon(t, p, "--daemon", "--no-fork", "--user", "root", "--group", "root", "--bind-address", "10.77.0.3", "--port", "69", "--maxthread", "100", dir)
		peers["atftpd 0.8"] = netip.MustParseAddr("10.77.0.3")
	}
	for _, line := range []struct {
		name  string
		delay time.Duration
	}{{"0.2 ms", 100 * time.Microsecond}, {"5 ms", 2500 * time.Microsecond}} {
		h := lan.HostOn(t, &netlab.Wire{Delay: line.delay}, fmt.Sprintf("10.77.0.%d/24", 20+line.delay/time.Millisecond))
		for _, window := range []int{1, 4} {
			fetch := func(at netip.Addr) float64 {
				var got []byte
				begun := time.Now()
				err := h.Do(func() (err error) {
					got, err = (&edk2.Client{Iface: h.Iface, Window: window}).TFTPRead(at, server.ImageName)
					return err
				})
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s, window %d, from %s: %d bytes, %v", line.name, window, at, len(got), err)
					return 0
				}
				return float64(len(data)) / 1e6 / time.Since(begun).Seconds()
			}
			for _, name := range slices.Sorted(mapsKeys(peers)) {
				at := peers[name]
				row := benchrow.Row{What: fmt.Sprintf("2 MB to one machine, %s there and back, window asked for: %d", line.name, window), Unit: "MB/s", Peer: name}
				fetch(at) // both are warm
				fetch(netip.MustParseAddr("10.77.0.1"))
				runs := pairs
				if line.delay > time.Millisecond && window == 1 {
					runs = 3
				}
				for range runs {
					row.Ours = append(row.Ours, fetch(netip.MustParseAddr("10.77.0.1")))
					row.Theirs = append(row.Theirs, fetch(at))
				}
				part.Add(t, row)
			}
		}
	}
}

func mapsKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// startNginx serves dir on port 8080 of the boot host, with sendfile, by one
// process.
func startNginx(t testing.TB, nginx, dir string) *os.Process {
	t.Helper()
	work := t.TempDir()
	conf := fmt.Sprintf("daemon off;\nuser root;\nmaster_process off;\npid %[1]s/pid;\nerror_log %[1]s/err;\nevents {}\nhttp { access_log off; sendfile on; tcp_nopush on;\n"+
		"client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;\n"+
		"server { listen 10.77.0.1:8080; root %[2]s; } }\n", work, dir)
	if err := os.WriteFile(work+"/conf", []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	p := daemon(t, nginx, "-c", work+"/conf", "-e", work+"/err")
	netlab.Eventually(t, 5*time.Second, "nginx is up", func() bool {
		c, err := net.Dial("tcp", "10.77.0.1:8080")
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p
}

// TestBenchHTTP: 200 MB to one machine, beside nginx with sendfile.
func TestBenchHTTP(t *testing.T) {
	part := benchrow.Begin(t, "http")
	nginx := peerProgram(t, "nginx")
	if nginx == "" {
		t.Skip("nginx is not installed: internal/dev/prerequisites bench")
	}
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	const size = 200 << 20
	dir, _ := image(t, size)
	peer := startNginx(t, nginx, dir)
	cfg := full(t, lan, dir)
	cfg.Mode = pxe.ModeOff
	start(t, cfg)
	h := lan.Host(t, "10.77.0.30/24")
	// The client is a program of its own, so that our processor time is the
	// server's.
	fetch := func(url string) float64 {
		begun := time.Now()
		err := h.Do(func() error {
			out, err := exec.Command("curl", "-sf", "-o", "/dev/null", "-w", "%{size_download}", url).Output()
			if err == nil && string(out) != strconv.Itoa(size) {
				err = fmt.Errorf("%s bytes", out)
			}
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", url, err)
		}
		return size / 1e6 / time.Since(begun).Seconds()
	}
	const ours, theirs = "http://10.77.0.1:7480/amd64/recovery.efi", "http://10.77.0.1:8080/recovery.efi"
	fetch(ours)
	fetch(theirs)
	speed := benchrow.Row{What: "200 MB to one machine", Unit: "MB/s", Peer: "nginx 1.22"}
	cost := benchrow.Row{What: "processor time of the server for it", Unit: "s", Less: true, Peer: "nginx 1.22", Note: "ours is the whole test process"}
	for range 7 {
		c := ownCPU()
		speed.Ours = append(speed.Ours, fetch(ours))
		cost.Ours = append(cost.Ours, ownCPU()-c)
		c = cpu(t, peer.Pid)
		speed.Theirs = append(speed.Theirs, fetch(theirs))
		cost.Theirs = append(cost.Theirs, cpu(t, peer.Pid)-c)
	}
	part.Add(t, speed)
	part.Add(t, cost)
}

// TestBenchDHCP: four-way exchanges by perfdhcp beside Kea. Every lease of
// ours is synced to disk before its ACK; Kea's memfile is written and not
// synced.
func TestBenchDHCP(t *testing.T) {
	part := benchrow.Begin(t, "dhcp")
	perf, kea := peerProgram(t, "perfdhcp"), peerProgram(t, "kea-dhcp4")
	if perf == "" || kea == "" {
		t.Skip("perfdhcp or kea-dhcp4 is not installed: internal/dev/prerequisites bench")
	}
	ratio := regexp.MustCompile(`(?m)^Rate: ([0-9.]+) 4-way`)
	dropped := regexp.MustCompile(`(?m)^drops ratio: ([0-9.]+)`)
	measure := func(rate int, peer bool) (done, lost, cost float64) {
		t.Run("", func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/16")
			h := lan.Host(t, "10.77.0.2/16")
			used := ownCPU
			if peer {
				work := t.TempDir()
				conf := fmt.Sprintf(`{"Dhcp4":{"interfaces-config":{"interfaces":["%s"],"dhcp-socket-type":"raw"},"lease-database":{"type":"memfile","persist":true,"name":"%s/leases.csv","lfc-interval":0},
"valid-lifetime":3600,"multi-threading":{"enable-multi-threading":false},"subnet4":[{"subnet":"10.77.0.0/16","pools":[{"pool":"10.77.1.0-10.77.250.255"}]}],
"loggers":[{"name":"kea-dhcp4","output_options":[{"output":"%s/log"}],"severity":"ERROR"}]}}`, lan.Name, work, work)
				if err := os.WriteFile(work+"/conf", []byte(conf), 0o600); err != nil {
					t.Fatal(err)
				}
				_ = os.MkdirAll("/run/kea", 0o755)
				p := daemon(t, kea, "-c", work+"/conf")
				used = func() float64 { return cpu(t, p.Pid) }
				netlab.Eventually(t, 10*time.Second, "Kea is up", func() bool {
					_, err := os.Stat(work + "/leases.csv")
					return err == nil
				})
			} else {
				cfg := full(t, lan, t.TempDir())
				cfg.ProbeWait = -1 // Kea does not probe
				cfg.Range = server.Range{From: netip.MustParseAddr("10.77.1.0"), To: netip.MustParseAddr("10.77.250.255")}
				cfg.Policy = server.PolicyFunc(func(context.Context, pxe.Machine) server.Decision { return server.Decision{Known: true} })
				start(t, cfg)
			}
			before := used()
			var out []byte
			err := h.Do(func() (err error) {
				out, err = exec.Command(perf, "-4", "-l", h.Iface, "-r", strconv.Itoa(rate), "-R", "50000", "-p", "5", "-W", "1000000").CombinedOutput()
				return err
			})
			cost = used() - before
			var exit *exec.ExitError
			if m := ratio.FindSubmatch(out); m != nil {
				done, _ = strconv.ParseFloat(string(m[1]), 64)
			} else if errors.As(err, &exit) || err != nil {
				t.Fatalf("perfdhcp: %v\n%s", err, out)
			}
			for _, m := range dropped.FindAllSubmatch(out, -1) {
				v, _ := strconv.ParseFloat(string(m[1]), 64)
				lost = max(lost, v)
			}
		})
		return done, lost, cost
	}
	for _, rate := range []int{500, 2000} {
		speed := benchrow.Row{What: fmt.Sprintf("leases/s when %d/s are asked for", rate), Unit: "leases/s", Peer: "Kea 2.2, 1 thread, memfile"}
		cost := benchrow.Row{What: "processor time for 1,000 leases", Unit: "s", Less: true, Peer: "Kea 2.2, 1 thread, memfile", Note: "ours syncs each lease to disk before its ACK, Kea does not sync; ours is the whole test process"}
		var worst [2]float64
		for range pairs {
			d, l, c := measure(rate, false)
			speed.Ours, worst[0] = append(speed.Ours, d), max(worst[0], l)
			if d > 0 {
				cost.Ours = append(cost.Ours, c/(d*5)*1000)
			}
			d, l, c = measure(rate, true)
			speed.Theirs, worst[1] = append(speed.Theirs, d), max(worst[1], l)
			if d > 0 {
				cost.Theirs = append(cost.Theirs, c/(d*5)*1000)
			}
		}
		speed.Note = fmt.Sprintf("worst share of packets without answer: ours %.1f %%, Kea %.1f %%", worst[0], worst[1])
		part.Add(t, speed)
		part.Add(t, cost)
	}
}

// TestBenchFiftyBesideNginx: the same 50 lines, and only the download, from us
// and from nginx in turn. What both lack to the line's rate is the lines' (1 %
// loss, RFC 5681) and this machine's, on which 50 cables and 50 clients run.
func TestBenchFiftyBesideNginx(t *testing.T) {
	part := benchrow.Begin(t, "fifty-nginx")
	nginx := peerProgram(t, "nginx")
	if nginx == "" {
		t.Skip("nginx is not installed: internal/dev/prerequisites bench")
	}
	size := 40 << 20
	if os.Getenv("MUSTER_BENCH_SMALL") != "" { // to see that it works
		size = 2 << 20
	}
	const n, line = 50, 1e9
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, data := image(t, size)
	startNginx(t, nginx, dir)
	cfg := full(t, lan, dir)
	cfg.Mode = pxe.ModeOff
	start(t, cfg)
	hosts := make([]*netlab.Host, n)
	for i := range hosts {
		hosts[i] = lan.HostOn(t, &netlab.Wire{Loss: 0.01, Seed: uint64(2 * i), Rate: line / n, Queue: 256 << 10}, fmt.Sprintf("10.77.0.%d/24", 30+i))
	}
	all := func(url string) float64 {
		var wg sync.WaitGroup
		begun := time.Now()
		for _, h := range hosts {
			wg.Go(func() {
				var got []byte
				err := h.Do(func() (err error) {
					got, err = (&edk2.Client{Iface: h.Iface, Patience: 10 * time.Minute}).Fetch(url)
					return err
				})
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s from %s: %d bytes, %v", h.MAC, url, len(got), err)
				}
			})
		}
		wg.Wait()
		return 100 * float64(size) * 8 / (line / n) / time.Since(begun).Seconds()
	}
	row := benchrow.Row{What: fmt.Sprintf("50 machines fetch %d MB together, 1 Gbit/s shared evenly, 1 %% loss: share of the line's rate", size>>20), Unit: "%", Peer: "nginx 1.22",
		Note: "cables and machines are one program beside both servers, on the same two cores"}
	for range 3 {
		row.Ours = append(row.Ours, all("http://10.77.0.1:7480/amd64/recovery.efi"))
		row.Theirs = append(row.Theirs, all("http://10.77.0.1:8080/recovery.efi"))
	}
	part.Add(t, row)
}

// TestBenchFifty: 50 machines are switched on together, at 1 Gbit/s shared
// evenly and 1 % loss, and fetch 40 MB each.
func TestBenchFifty(t *testing.T) {
	part := benchrow.Begin(t, "fifty")
	const n, size, line = 50, 40 << 20, 1e9
	for _, web := range []bool{true, false} {
		name := map[bool]string{true: "HTTP", false: "TFTP"}[web]
		t.Run(name, func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			dir, data := image(t, size)
			start(t, full(t, lan, dir))
			wires, hosts := make([]*netlab.Wire, n), make([]*netlab.Host, n)
			for i := range hosts {
				wires[i] = &netlab.Wire{Loss: 0.01, Seed: uint64(2 * i), Rate: line / n, Queue: 256 << 10}
				hosts[i] = lan.HostOn(t, wires[i])
			}
			var wg sync.WaitGroup
			var mu sync.Mutex
			var took []float64
			again := 0
			begun := time.Now()
			for _, h := range hosts {
				wg.Go(func() {
					res, err := boot(h, func(c *edk2.Client) {
						c.Wait = []time.Duration{4 * time.Second, 8 * time.Second, 16 * time.Second, 32 * time.Second}
						if web {
							http(c)
						}
						c.Patience = 10 * time.Minute
					})
					mu.Lock()
					defer mu.Unlock()
					if err != nil || !bytes.Equal(res.Data, data) {
						t.Errorf("%s: %d bytes, %v", h.MAC, len(res.Data), err)
						return
					}
					if res.Rounds > 1 {
						again++
					}
					took = append(took, (time.Since(begun) - res.Offered).Seconds())
				})
			}
			wg.Wait()
			if len(took) == 0 {
				t.Fatal("none booted")
			}
			bare := float64(size) * 8 / (line / n)
			part.Add(t, benchrow.Row{What: fmt.Sprintf("50 machines together, 40 MB by %s, 1 Gbit/s shared evenly, 1 %% loss: share of the line's rate", name), Unit: "%",
				Ours: []float64{100 * bare / slices.Max(took)}, Note: fmt.Sprintf("%d of %d machines fetched it; the slowest in %.1f s, the fastest in %.1f s, the bare line %.1f s; %d needed a second DISCOVER (their packet was among the lost); machines, cables and server are one program here and share the two cores with all else: under such a load this measures the machine",
					len(took), n, slices.Max(took), slices.Min(took), bare, again)})
		})
	}
}
