package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary plays four parts: itself, the launcher, the child on its
// way to become k3s, and (a copy of it named k3s) k3s as the launcher sees it.
func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == "k3s":
		playK3s()
		return
	case filepath.Base(os.Args[0]) == "systemctl":
		if err := playSystemctl(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	case len(os.Args) > 1 && os.Args[1] == "k3s-child":
		if err := BecomeK3s(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	case len(os.Args) > 2 && os.Args[1] == "launcher":
		var c Config
		if err := json.Unmarshal([]byte(os.Args[2]), &c); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		l, err := New(c)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := l.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// script is how the played k3s behaves; it is a comment in the config.
type script struct {
	Stubborn  time.Duration `json:"stubborn,omitempty"` // goes on so long after SIGTERM; <0: for ever
	Fails     bool          `json:"fails,omitempty"`    // ends at once, with status 0
	Container bool          `json:"container,omitempty"`
	Datastore bool          `json:"datastore,omitempty"` // makes a datastore
	Chatty    bool          `json:"chatty,omitempty"`    // fills the log
}

const scriptMark = "# script "

// playK3s behaves like k3s as far as the launcher can tell: it changes its
// title, leaves a container behind, ends late, and with status 0 whatever
// happens. It also notes when it runs, and whether another one does.
func playK3s() {
	var config string
	for i, a := range os.Args {
		if a == "--config" {
			config = strings.Clone(os.Args[i+1]) // its memory is overwritten below
		}
	}
	b, err := os.ReadFile(config)
	if err != nil {
		fmt.Println(err)
		os.Exit(0)
	}
	var s script
	for l := range strings.Lines(string(b)) {
		if t, ok := strings.CutPrefix(l, scriptMark); ok {
			if err := json.Unmarshal([]byte(t), &s); err != nil {
				panic(err)
			}
		}
	}
	dir := filepath.Dir(config)
	note := func(file, text string) {
		f, err := os.OpenFile(filepath.Join(dir, file), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(f, text)
		f.Close()
	}
	// The lock is the judge of "never two at once"; it ends with the process.
	l, err := os.OpenFile(filepath.Join(dir, "alone"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		panic(err)
	}
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		note("twice", strconv.Itoa(os.Getpid()))
		os.Exit(0)
	}
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, "K3S_") {
			note("leaked", e)
		}
	}
	note("starts", strconv.Itoa(os.Getpid())+" "+strings.Join(os.Args[1:], " "))
	for _, a := range os.Args { // as k3s does: its arguments say nothing afterwards
		p := unsafe.Slice(unsafe.StringData(a), len(a))
		for i := range p {
			p[i] = ' '
		}
	}
	if s.Fails {
		os.Exit(0)
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	if s.Container {
		c := exec.Command("/bin/sleep", "1000")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			panic(err)
		}
		note("container", strconv.Itoa(c.Process.Pid))
	}
	if s.Datastore {
		if err := os.MkdirAll(filepath.Join(dir, "data", "server", "db", "etcd", "member", "wal"), 0o700); err != nil {
			panic(err)
		}
	}
	if sock := os.Getenv("NOTIFY_SOCKET"); sock != "" {
		c, err := net.Dial("unixgram", sock)
		if err == nil {
			_, err = c.Write([]byte("READY=1\nSTATUS=up\nMAINPID=1"))
		}
		if err != nil {
			note("notify", err.Error())
		}
	}
	var end <-chan time.Time
	t := time.NewTicker(5 * time.Millisecond)
	for {
		// Proof of life, for "gone before the lease ends".
		if err := os.WriteFile(filepath.Join(dir, "beat"), []byte(strconv.FormatInt(int64(Boottime()), 10)), 0o600); err != nil {
			panic(err)
		}
		if s.Chatty {
			fmt.Println(strings.Repeat("x", 1000))
		}
		select {
		case <-term:
			if s.Stubborn >= 0 {
				end = time.After(s.Stubborn)
			}
		case <-end:
			os.Exit(0)
		case <-t.C:
		}
	}
}

// world is a node's files, a launcher, and the played k3s.
type world struct {
	t   *testing.T
	dir string
	cfg Config
}

func newWorld(t *testing.T, s script) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	dir, err := os.MkdirTemp("", "k3s") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, cfg: Config{
		Paths:  Paths{State: dir + "/state", Run: dir + "/run", Data: dir + "/data", Config: dir, Node: dir + "/node"},
		Binary: dir + "/k3s", Pause: 20 * time.Millisecond, MaxPause: time.Second, StopTimeout: 20 * time.Second, Ports: []int{}}}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Child = []string{self, "k3s-child"}
	w.copySelf(w.cfg.Binary)
	w.config(s, "server: https://100.96.0.1:6443\n")
	t.Setenv("K3S_TOKEN", "secret") // must not reach k3s
	return w
}

// copySelf makes a program of the test binary: another file, so that looking
// for k3s by its file does not find the test.
func (w *world) copySelf(to string) {
	w.t.Helper()
	self, err := os.Executable()
	w.must(err)
	in, err := os.Open(self)
	w.must(err)
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	w.must(err)
	_, err = io.Copy(out, in)
	w.must(errors.Join(err, out.Close()))
}

func (w *world) config(s script, more string) {
	w.t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		w.t.Fatal(err)
	}
	w.must(WriteBytes(w.cfg.Paths.ConfigFile(), []byte(scriptMark+string(b)+"\n"+more)))
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) boot() string {
	b, err := BootID()
	w.must(err)
	return b
}

func (w *world) allow(r Role, plan string) {
	w.t.Helper()
	w.must(WriteFile(w.cfg.Paths.RoleFile(), RoleNote{Role: r, Plan: plan}))
	w.must(WriteFile(w.cfg.Paths.GoFile(), Go{Boot: w.boot()}))
}

func (w *world) lease(plan string, until time.Duration) {
	w.t.Helper()
	w.must(WriteFile(w.cfg.Paths.LeaseFile(), Lease{Plan: plan, Boot: w.boot(), Until: until}))
}

// control is the direct control of a launcher in a process of its own.
func (w *world) control() *Direct {
	w.t.Helper()
	b, err := json.Marshal(w.cfg)
	w.must(err)
	self, err := os.Executable()
	w.must(err)
	d := &Direct{Command: []string{self, "launcher", string(b)}, Paths: w.cfg.Paths, Patience: 40 * time.Second}
	w.t.Cleanup(func() { _ = d.Stop(context.Background()) })
	return d
}

func (w *world) lines(file string) []string {
	b, err := os.ReadFile(filepath.Join(w.dir, file))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	w.must(err)
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}

// until waits for something that must come; the test's own time limit bounds
// it.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	give := time.After(time.Minute) // nothing here takes long; this only ends a hopeless test
	for !ok() {
		select {
		case <-t.C:
		case <-give:
			w.t.Fatalf("never: %s", what)
		}
	}
}

func (w *world) state(s State) func() bool {
	return func() bool { x, err := w.cfg.Paths.ReadStatus(); return err == nil && x.State == s }
}

func (w *world) up() *Process {
	w.t.Helper()
	w.until("k3s says ready", func() bool {
		x, err := w.cfg.Paths.ReadStatus()
		return err == nil && x.Ready && x.State == Running
	})
	return w.cfg.Paths.K3s()
}

func (w *world) never(file string) {
	w.t.Helper()
	if l := w.lines(file); len(l) > 0 {
		w.t.Errorf("%s: %v", file, l)
	}
}

func TestWorkerRunsAndStops(t *testing.T) {
	w := newWorld(t, script{Container: true, Stubborn: 300 * time.Millisecond})
	w.allow(Worker, "")
	c := w.control()
	w.must(c.Start(t.Context()))
	k := w.up()
	if k == nil {
		t.Fatal("no process file")
	}
	if got := w.lines("starts"); len(got) != 1 || got[0] != fmt.Sprintf("%d agent --config %s", k.PID, w.cfg.Paths.ConfigFile()) {
		t.Errorf("starts: %q", got)
	}
	if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", k.PID)); strings.Contains(string(b), "agent") {
		t.Errorf("the played k3s did not change its title: %q", b)
	}
	w.must(c.Start(t.Context())) // no error, no second one
	w.must(c.Stop(t.Context()))
	if k.Alive() {
		t.Error("Stop returned while k3s lived")
	}
	if on, err := c.Running(t.Context()); on || err != nil {
		t.Errorf("launcher runs: %v %v", on, err)
	}
	pid, err := strconv.Atoi(w.lines("container")[0])
	w.must(err)
	if err := syscall.Kill(pid, 0); err != nil {
		t.Errorf("the container did not survive: %v", err)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	w.must(c.Stop(t.Context())) // stopping what does not run is no error
	w.never("twice")
	w.never("leaked")
	w.never("notify")
	if got := len(w.lines("starts")); got != 1 {
		t.Errorf("%d starts", got)
	}
}

func TestNotify(t *testing.T) {
	w := newWorld(t, script{})
	sock := w.dir + "/systemd"
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	w.must(err)
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	t.Setenv("WATCHDOG_USEC", "20000000")
	w.allow(Candidate, "p1") // not started without a lease
	w.must(w.control().Start(t.Context()))
	read := func() string {
		b := make([]byte, 4096)
		n, err := c.Read(b)
		w.must(err)
		if strings.Contains(string(b[:n]), "MAINPID") {
			t.Errorf("%q", b[:n])
		}
		return string(b[:n])
	}
	for seen := 0; seen < 2; {
		switch m := read(); {
		case strings.Contains(m, "READY"):
			t.Fatal("ready before k3s was started")
		case m == "WATCHDOG=1":
			seen++
		}
	}
	w.lease("p1", Boottime()+4*time.Minute)
	for read() != "READY=1" {
	}
	if !w.state(Running)() {
		t.Error("ready before it runs")
	}
}

func TestStubbornK3sIsKilled(t *testing.T) {
	w := newWorld(t, script{Stubborn: -1})
	w.cfg.StopTimeout = 300 * time.Millisecond
	w.allow(Worker, "")
	c := w.control()
	w.must(c.Start(t.Context()))
	k := w.up()
	w.must(c.Stop(t.Context()))
	if k.Alive() {
		t.Error("it still lives")
	}
}

func TestLauncherKilled(t *testing.T) {
	w := newWorld(t, script{Stubborn: 400 * time.Millisecond})
	w.allow(Worker, "")
	c := w.control()
	w.must(c.Start(t.Context()))
	k := w.up()
	s, err := w.cfg.Paths.ReadStatus()
	w.must(err)
	w.must(syscall.Kill(s.Launcher.PID, syscall.SIGKILL))
	w.until("the launcher is gone", func() bool { return !s.Launcher.Alive() })
	if !k.Alive() {
		t.Fatal("a worker's k3s died with its launcher")
	}
	if w.cfg.Paths.K3s() == nil {
		t.Fatal("the k3s of a dead launcher is not found")
	}
	// A new launcher ends the old k3s, which takes its time, before it starts
	// another one.
	w.must(c.Start(t.Context()))
	w.until("a second start", func() bool { return len(w.lines("starts")) == 2 })
	if k.Alive() {
		t.Error("two at once")
	}
	w.up()
	w.never("twice")

	// Stop finds a k3s without launcher, too.
	k = w.cfg.Paths.K3s()
	s, err = w.cfg.Paths.ReadStatus()
	w.must(err)
	w.must(syscall.Kill(s.Launcher.PID, syscall.SIGKILL))
	w.until("the launcher is gone", func() bool { return !s.Launcher.Alive() })
	w.must(c.Stop(t.Context()))
	if k.Alive() {
		t.Error("Stop left a k3s without launcher")
	}
}

func TestOneLauncherOnly(t *testing.T) {
	w := newWorld(t, script{})
	w.allow(Worker, "")
	c := w.control()
	w.must(c.Start(t.Context()))
	w.up()
	l, err := New(w.cfg)
	w.must(err)
	if err := l.Run(t.Context()); !errors.Is(err, ErrLocked) {
		t.Errorf("second launcher: %v", err)
	}
	if err := Once(t.Context(), w.cfg, []string{"server", "--cluster-reset"}); !errors.Is(err, ErrLocked) {
		t.Errorf("reset beside a launcher: %v", err)
	}
}

func TestForeignK3sIsInTheWay(t *testing.T) {
	w := newWorld(t, script{})
	w.allow(Worker, "")
	other := exec.Command(w.cfg.Binary, "agent", "--config", w.cfg.Paths.ConfigFile())
	w.must(other.Start())
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	w.until("the foreign one runs", func() bool { return len(w.lines("starts")) == 1 })
	c := w.control()
	w.must(c.Start(t.Context()))
	w.until("the launcher refuses", func() bool {
		s, err := w.cfg.Paths.ReadStatus()
		return err == nil && s.State == Refused && strings.Contains(s.Reason, strconv.Itoa(other.Process.Pid))
	})
	w.must(other.Process.Kill())
	_ = other.Wait()
	w.up()
	w.never("twice")
}

func TestPortInUse(t *testing.T) {
	w := newWorld(t, script{})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	w.must(err)
	w.cfg.Ports = []int{l.Addr().(*net.TCPAddr).Port}
	w.allow(Worker, "")
	w.must(w.control().Start(t.Context()))
	w.until("the launcher refuses", func() bool {
		s, err := w.cfg.Paths.ReadStatus()
		return err == nil && s.State == Refused && strings.Contains(s.Reason, "port")
	})
	w.never("starts")
	w.must(l.Close())
	w.up()
}

func TestRestartsWhateverTheExitCode(t *testing.T) {
	w := newWorld(t, script{Fails: true})
	w.allow(Worker, "")
	w.must(w.control().Start(t.Context()))
	w.until("five starts", func() bool { return len(w.lines("starts")) >= 5 })
	w.config(script{}, "server: https://100.96.0.1:6443\n")
	w.up()
	w.never("twice")
}

func TestInitIsForOneStart(t *testing.T) {
	w := newWorld(t, script{Fails: true})
	w.config(script{Fails: true}, "")
	w.allow(Server, "")
	w.must(WriteFile(w.cfg.Paths.InitFile(), Init{Boot: w.boot()}))
	c := w.control()
	w.must(c.Start(t.Context()))
	w.until("the launcher refuses a second start", func() bool {
		s, err := w.cfg.Paths.ReadStatus()
		return err == nil && s.State == Refused && strings.Contains(s.Reason, "new cluster")
	})
	if got := w.lines("starts"); len(got) != 1 || !strings.HasSuffix(got[0], "--cluster-init") {
		t.Fatalf("starts: %q", got)
	}
	// Allowed again, it makes its datastore; from then on there is no
	// cluster-init, whatever the file says.
	w.config(script{Datastore: true}, "")
	w.must(WriteFile(w.cfg.Paths.InitFile(), Init{Boot: w.boot()}))
	k := w.up()
	w.must(WriteFile(w.cfg.Paths.InitFile(), Init{Boot: w.boot()}))
	w.must(syscall.Kill(k.PID, syscall.SIGKILL))
	w.until("a third start", func() bool { return len(w.lines("starts")) == 3 })
	got := w.lines("starts")
	if !strings.HasSuffix(got[1], "--cluster-init") || strings.Contains(got[2], "init") {
		t.Errorf("starts: %q", got)
	}
	if exists(w.cfg.Paths.InitFile()) {
		t.Error("the permission for cluster-init outlived a start")
	}
}

func TestCandidateLease(t *testing.T) {
	beat := func(w *world) time.Duration {
		l := w.lines("beat")
		if len(l) == 0 || l[0] == "" {
			return 0
		}
		n, err := strconv.ParseInt(l[0], 10, 64)
		w.must(err)
		return time.Duration(n)
	}
	t.Run("gone before the lease ends, however stubborn", func(t *testing.T) {
		w := newWorld(t, script{Stubborn: -1})
		w.allow(Candidate, "p1")
		w.must(w.control().Start(t.Context()))
		w.until("refused without a lease", w.state(Refused))
		w.lease("p2", Boottime()+time.Minute) // of another plan
		w.lease("p1", Boottime()+time.Hour)   // absurd
		until := Boottime() + minLease + time.Second
		w.never("starts")
		w.lease("p1", until)
		k := w.up()
		w.until("k3s is gone", func() bool { return !k.Alive() })
		if last := beat(w); last >= until {
			t.Errorf("k3s lived %s longer than its lease", last-until)
		}
		w.until("refused again", w.state(Refused))
	})
	for name, spoil := range map[string]func(*world) error{
		"lost": func(w *world) error { return os.Remove(w.cfg.Paths.LeaseFile()) },
		"torn": func(w *world) error { return os.WriteFile(w.cfg.Paths.LeaseFile(), []byte(`{"plan":"p1","bo`), 0o600) },
	} {
		t.Run("a "+name+" lease file is no lease", func(t *testing.T) {
			w := newWorld(t, script{Stubborn: -1})
			w.allow(Candidate, "p1")
			w.lease("p1", Boottime()+4*time.Minute)
			w.must(w.control().Start(t.Context()))
			k := w.up()
			w.must(spoil(w))
			w.until("k3s is gone", func() bool { return !k.Alive() })
			w.until("refused", w.state(Refused))
		})
	}
	for name, spoil := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "hung": syscall.SIGSTOP} {
		t.Run("gone in time when its launcher is "+name, func(t *testing.T) {
			w := newWorld(t, script{Stubborn: -1})
			w.allow(Candidate, "p1")
			w.lease("p1", Boottime()+4*time.Minute)
			w.must(w.control().Start(t.Context()))
			k := w.up()
			s, err := w.cfg.Paths.ReadStatus()
			w.must(err)
			w.must(syscall.Kill(s.Launcher.PID, spoil))
			defer func() { _ = syscall.Kill(s.Launcher.PID, syscall.SIGCONT) }()
			until := Boottime() + 3*time.Second
			w.lease("p1", until)
			w.until("k3s is gone", func() bool { return !k.Alive() })
			if last := beat(w); last >= until {
				t.Errorf("k3s lived %s longer than its lease", last-until)
			}
		})
	}
	t.Run("a killed guard is replaced, and ends with k3s", func(t *testing.T) {
		w := newWorld(t, script{})
		w.allow(Candidate, "p1")
		w.lease("p1", Boottime()+4*time.Minute)
		c := w.control()
		w.must(c.Start(t.Context()))
		w.up()
		pid := func() int { s, err := w.cfg.Paths.ReadStatus(); w.must(err); return s.Guard }
		first := pid()
		if first == 0 {
			t.Fatal("no guard")
		}
		w.must(syscall.Kill(first, syscall.SIGKILL))
		w.until("another guard", func() bool { p := pid(); return p != 0 && p != first })
		g, err := identify(pid())
		w.must(err)
		w.must(c.Stop(t.Context()))
		w.until("the guard ends", func() bool { return !g.Alive() })
	})
	t.Run("confirmed: runs on without a lease", func(t *testing.T) {
		w := newWorld(t, script{Datastore: true})
		w.allow(Candidate, "p1")
		w.lease("p1", Boottime()+4*time.Minute)
		w.must(w.control().Start(t.Context()))
		k := w.up()
		w.must(WriteFile(w.cfg.Paths.RoleFile(), RoleNote{Role: Server}))
		w.until("the launcher takes note", func() bool {
			s, err := w.cfg.Paths.ReadStatus()
			return err == nil && s.Role == string(Server)
		})
		w.must(os.Remove(w.cfg.Paths.LeaseFile()))
		// Two more looks of the launcher: its status is written at a rotation
		// of roles only, so look at what would have ended by now.
		w.lease("p9", Boottime())
		w.until("a few more beats", func() bool { return beat(w) > Boottime()-time.Second })
		if !k.Alive() {
			t.Error("a confirmed server was stopped")
		}
	})
}

func TestNothingRunsWithoutPermissionOfThisBoot(t *testing.T) {
	w := newWorld(t, script{})
	w.allow(Worker, "")
	w.must(WriteFile(w.cfg.Paths.GoFile(), Go{Boot: "of another boot"}))
	l, err := New(w.cfg)
	w.must(err)
	w.must(l.Run(t.Context()))
	w.never("starts")
	if s, err := w.cfg.Paths.ReadStatus(); err != nil || s.State != Gone {
		t.Errorf("%+v %v", s, err)
	}
}

func TestLogIsBounded(t *testing.T) {
	w := newWorld(t, script{Chatty: true})
	w.cfg.LogSize, w.cfg.LogFiles = 20_000, 3
	w.allow(Worker, "")
	c := w.control()
	w.must(c.Start(t.Context()))
	w.until("three files", func() bool { return exists(w.cfg.Paths.LogFile() + ".2") })
	w.must(c.Stop(t.Context()))
	if b, err := os.ReadFile(w.cfg.Paths.LogFile()); err != nil || strings.HasPrefix(string(b), StartMark) {
		t.Errorf("the log was never emptied: %v", err)
	}
	for i := range 5 {
		fi, err := os.Stat(w.cfg.Paths.LogFile() + "." + strconv.Itoa(i+1))
		if i >= 2 {
			if err == nil {
				t.Errorf("file %d exists", i+1)
			}
			continue
		}
		w.must(err)
		if fi.Size() > w.cfg.LogSize {
			t.Errorf("file %d has %d bytes", i+1, fi.Size())
		}
	}
}

func TestOnce(t *testing.T) {
	w := newWorld(t, script{Fails: true})
	w.must(Once(t.Context(), w.cfg, []string{"server", "--config", w.cfg.Paths.ConfigFile(), "--cluster-reset"}))
	if got := w.lines("starts"); len(got) != 1 || !strings.HasSuffix(got[0], "--cluster-reset") {
		t.Errorf("starts: %q", got)
	}
	w.config(script{Stubborn: -1}, "")
	w.cfg.StopTimeout = 100 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		w.until("it runs", func() bool { return len(w.lines("starts")) == 2 })
		cancel()
	}()
	if err := Once(ctx, w.cfg, []string{"server", "--config", w.cfg.Paths.ConfigFile()}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if w.cfg.Paths.K3s() != nil {
		t.Error("it still runs")
	}
}
