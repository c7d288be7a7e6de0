package host

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// restartAfter is how long a service that ended is left alone (what systemd's
// RestartSec would be).
const restartAfter = time.Second

// Inside is the whole life of a node's first process: it makes the node out
// of the fresh namespaces it is in, starts what runs on it, and obeys the lab
// until it is killed. in has the briefing.
func Inside(in io.Reader) error {
	if os.Getpid() != 1 {
		return errors.New("host: be a node: not the first process of a PID namespace (this command is started by `muster lab run`)")
	}
	var b briefing
	if err := json.NewDecoder(in).Decode(&b); err != nil {
		return fmt.Errorf("host: read briefing (this command is started by `muster lab run`): %w", err)
	}
	f := os.NewFile(controlFD, "control")
	c, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("host: open control socket: %w", err)
	}
	_ = f.Close()
	n := &first{b: b, conn: c.(*net.UnixConn), services: map[string]*service{}, mine: map[int]bool{}}
	return n.run()
}

// first is a node's first process.
type first struct {
	b    briefing
	conn *net.UnixConn
	tpm  *swtpmtest.TPM

	out sync.Mutex // guards standard output and conn's sending side

	// A child must be known as ours before anybody collects it.
	children sync.RWMutex
	mineLock sync.Mutex
	mine     map[int]bool

	mu       sync.Mutex
	services map[string]*service
}

type service struct {
	Service
	cmd     *exec.Cmd
	stopped bool
	gone    chan struct{}
}

func (n *first) run() error {
	go n.reap()
	if err := unix.Sethostname([]byte(n.b.Name)); err != nil {
		return fmt.Errorf("host: set host name: %w", err)
	}
	if err := makeRoot(&n.b, n.b.Root); err != nil {
		return err
	}
	if err := n.network(); err != nil {
		return err
	}
	if err := n.powerTPM(); err != nil {
		return err
	}
	for name, text := range n.b.Files {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return fmt.Errorf("host: write files: %w", err)
		}
		if err := os.WriteFile(name, text, 0o644); err != nil {
			return fmt.Errorf("host: write files: %w", err)
		}
	}
	for _, s := range n.b.Services {
		n.start(s)
	}
	d := json.NewDecoder(n.conn)
	n.answer(answer{}) // the node is up
	for {
		var r request
		if err := d.Decode(&r); err != nil {
			return nil // the lab is gone; so are we, and all with us
		}
		go func() {
			a, err := n.obey(r)
			if err != nil {
				a.Error = err.Error()
			}
			a.ID = r.ID
			n.answer(a)
		}()
	}
}

func (n *first) answer(a answer) {
	b, err := json.Marshal(a)
	if err != nil {
		return // strings and numbers: cannot happen
	}
	n.out.Lock()
	defer n.out.Unlock()
	_, _ = n.conn.Write(append(b, '\n'))
}

// network makes the cable and hands its other end to the lab.
func (n *first) network() error {
	mac, err := net.ParseMAC(n.b.MAC)
	if err != nil {
		return fmt.Errorf("host: make network: %w", err)
	}
	tap, err := OpenTap(Link, mac)
	if err != nil {
		return err
	}
	err = sendFile(n.conn, tap)
	// The lab holds it from now on: the link is up for as long as it does.
	if err := errors.Join(err, tap.Close()); err != nil {
		return err
	}
	if err := up("lo"); err != nil {
		return err
	}
	return ConfigureLink(Link, Address{n.b.Address, n.b.Gateway})
}

// powerTPM starts the TPM and does what firmware does with it.
func (n *first) powerTPM() error {
	// The EK authority is the vendor's, not the node's: what swtpmtest makes
	// here for want of it is thrown away and certifies nothing.
	t, err := swtpmtest.New(tpmDir, swtpmtest.Options{CADir: "/run/no-authority", Stopped: true})
	if err != nil {
		return err
	}
	n.children.RLock()
	err = t.Start()
	if err == nil {
		n.note(t.PID())
	}
	n.children.RUnlock()
	if err != nil {
		return err
	}
	n.tpm = t
	if n.b.ClearTPM {
		if err := t.Clear(); err != nil {
			return err
		}
	}
	for _, e := range n.b.Events {
		if err := t.Extend(e.PCR, e.Digest); err != nil {
			return err
		}
	}
	if err := os.WriteFile(EventLogFile, EventLog(n.b.Events), 0o444); err != nil {
		return fmt.Errorf("host: write event log: %w", err)
	}
	return nil
}

func (n *first) obey(r request) (answer, error) {
	switch r.Op {
	case "exec":
		return n.exec(r)
	case "start":
		n.start(r.Service)
		return answer{}, nil
	case "stop":
		return answer{}, n.stop(r.Service.Name, syscall.SIGTERM, true)
	case "kill":
		return answer{}, n.stop(r.Service.Name, syscall.SIGKILL, false)
	case "address":
		return answer{}, ConfigureLink(Link, Address{r.Address, r.Gateway})
	}
	return answer{}, fmt.Errorf("host: no operation %q", r.Op)
}

// launch starts a command as a child that its own Wait collects.
func (n *first) launch(cmd *exec.Cmd) error {
	n.children.RLock()
	defer n.children.RUnlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	n.note(cmd.Process.Pid)
	return nil
}

func (n *first) note(pid int) {
	n.mineLock.Lock()
	n.mine[pid] = true
	n.mineLock.Unlock()
}

func (n *first) forget(pid int) {
	n.mineLock.Lock()
	delete(n.mine, pid)
	n.mineLock.Unlock()
}

func (n *first) exec(r request) (answer, error) {
	limit := r.Limit
	if limit <= 0 {
		limit = time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var out, errs capped
	cmd := exec.CommandContext(ctx, r.Argv[0], r.Argv[1:]...)
	cmd.Env = append(n.environment(), r.Env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = 2 * time.Second
	if err := n.launch(cmd); err != nil {
		return answer{}, err
	}
	err := cmd.Wait()
	n.forget(cmd.Process.Pid)
	a := answer{Stdout: out.Bytes(), Stderr: errs.Bytes(), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		return a, errors.Join(err, ctx.Err())
	}
	return a, nil
}

func (n *first) environment() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "HOSTNAME=" + n.b.Name}
}

// start runs a service until it is stopped; it is started again when it ends.
func (n *first) start(s Service) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.services[s.Name]; old != nil && !old.stopped {
		return
	}
	v := &service{Service: s, gone: make(chan struct{})}
	n.services[s.Name] = v
	go n.keep(v)
}

func (n *first) keep(v *service) {
	defer close(v.gone)
	for {
		r, w, err := os.Pipe()
		if err != nil {
			n.say(v.Name, "host: "+err.Error())
			return
		}
		cmd := exec.Command(v.Argv[0], v.Argv[1:]...)
		cmd.Env = append(n.environment(), v.Env...)
		cmd.Stdout, cmd.Stderr = w, w
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		n.mu.Lock()
		if v.stopped {
			n.mu.Unlock()
			_, _ = r.Close(), w.Close()
			return
		}
		v.cmd = cmd
		err = n.launch(cmd)
		n.mu.Unlock()
		_ = w.Close()
		if err == nil {
			// What the service starts detached may hold the pipe for longer.
			go n.relay(v.Name, r)
			err = cmd.Wait()
			n.forget(cmd.Process.Pid)
		} else {
			_ = r.Close()
		}
		n.say(v.Name, fmt.Sprintf("host: %s ended: %v", v.Name, err))
		timer := time.NewTimer(restartAfter)
		<-timer.C
	}
}

// stop ends a service. For good, it is not started again.
func (n *first) stop(name string, with syscall.Signal, good bool) error {
	n.mu.Lock()
	v := n.services[name]
	if v == nil || v.cmd == nil || v.cmd.Process == nil {
		n.mu.Unlock()
		return fmt.Errorf("host: stop %s: it does not run", name)
	}
	v.stopped = v.stopped || good
	err := v.cmd.Process.Signal(with)
	n.mu.Unlock()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	if err != nil || !good {
		return err
	}
	select {
	case <-v.gone:
		return nil
	case <-time.After(20 * time.Second):
		return fmt.Errorf("host: stop %s: it does not end", name)
	}
}

// relay passes a service's lines on to the lab.
func (n *first) relay(name string, r io.ReadCloser) {
	defer r.Close()
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 64<<10), 1<<20)
	for s.Scan() {
		n.say(name, s.Text())
	}
	_, _ = io.Copy(io.Discard, r) // after a line that is too long
}

func (n *first) say(name, line string) {
	n.out.Lock()
	defer n.out.Unlock()
	_, _ = fmt.Fprintf(os.Stdout, "%s\t%s\n", name, line)
}

// reap collects processes whose parents died, as every first process must;
// our own children belong to whoever waits for them.
func (n *first) reap() {
	ch := make(chan os.Signal, 16)
	signal.Notify(ch, syscall.SIGCHLD)
	for range ch {
		n.children.Lock()
		for _, pid := range zombies() {
			n.mineLock.Lock()
			ours := n.mine[pid]
			n.mineLock.Unlock()
			if !ours {
				_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
			}
		}
		n.children.Unlock()
	}
}

// zombies lists ended children of the first process.
func zombies() []int {
	list, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	var out []int
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		end := bytes.LastIndexByte(b, ')')
		f := strings.Fields(string(b[end+1:]))
		if len(f) < 2 || f[0] != "Z" || f[1] != "1" {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

// capped keeps the first maxOutput bytes.
type capped struct{ bytes.Buffer }

func (c *capped) Write(p []byte) (int, error) {
	if room := maxOutput - c.Len(); room > 0 {
		_, _ = c.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
