package host

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab/host/ether"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// Config describes a node.
type Config struct {
	// Name is its host name and its port at the switch.
	Name string
	// Dir is its directory on the host, absolute: disk, TPM, logs.
	Dir string
	// Switch is what its cable is plugged into.
	Switch *ether.Switch
	// MAC is its hardware address; made of Name if empty.
	MAC string
	// Address (CIDR) and Gateway are what it has on its link.
	Address, Gateway string
	// Authority is the directory of the EK authority that vouches for its TPM.
	Authority string
	// Image is what it boots.
	Image Image
	// Extra is measured after the image: something that is not ours.
	Extra []Event
	// Shared are directories of the host that it sees read-only.
	Shared []string
	// Files are put onto it at each power-on, by path.
	Files map[string][]byte
	// Services run while it is on.
	Services []Service
	// Program is the program to start as its first process; this one if "".
	Program string
	// OnLine gets what its services print, line by line. It must not block.
	OnLine func(service, line string)
}

// Node is a virtual node. Its methods may be called from any goroutine.
type Node struct {
	id fleet.NodeID

	mu   sync.Mutex
	cfg  Config
	run  *running
	wipe bool // clear the TPM with the next power-on
	ons  int
}

// running is a node that is on.
type running struct {
	cmd   *exec.Cmd
	call  *caller
	since time.Time
	done  chan struct{}
	err   error // valid after done
}

// CheckHost returns what this host lacks to run nodes. lossy is the reason
// why disks do not lose unsynced data here, nil if they do.
func CheckHost() (missing []string, lossy error) {
	for _, p := range []string{"swtpm", "swtpm_setup"} {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	return missing, diskNeeds()
}

// New makes a node with an empty disk and a TPM of its own, switched off.
func New(cfg Config) (*Node, error) {
	if !filepath.IsAbs(cfg.Dir) || cfg.Name == "" || cfg.Switch == nil {
		return nil, errors.New("host: make node: name, absolute directory and switch are needed")
	}
	sum := sha256.Sum256([]byte(cfg.Name))
	if cfg.MAC == "" {
		cfg.MAC = net.HardwareAddr{0x52, 0x54, 0x00, sum[0], sum[1], sum[2]}.String()
	}
	for _, d := range []string{"root", "tpm"} {
		if err := os.MkdirAll(filepath.Join(cfg.Dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("host: make node: %w", err)
		}
	}
	n := &Node{cfg: cfg}
	t, err := swtpmtest.New(n.tpmDir(), swtpmtest.Options{CADir: cfg.Authority, Stopped: true})
	if err == nil {
		n.id, err = identify(context.Background(), t)
	}
	if err != nil {
		return nil, fmt.Errorf("host: make node %s: %w", cfg.Name, err)
	}
	return n, n.ReplaceDisk()
}

// Paper returns a node that has a name and nothing else, for tests of what
// looks at nodes: it is off for ever.
func Paper(name string) *Node { return &Node{cfg: Config{Name: name}} }

// Name is the node's host name.
func (n *Node) Name() string { return n.cfg.Name }

// ID is what the node's TPM makes it.
func (n *Node) ID() fleet.NodeID { return n.id }

// Dir is the node's directory on the host.
func (n *Node) Dir() string { return n.cfg.Dir }

func (n *Node) tpmDir() string   { return filepath.Join(n.cfg.Dir, "tpm") }
func (n *Node) diskFile() string { return filepath.Join(n.cfg.Dir, "disk.img") }
func (n *Node) diskDir() string  { return filepath.Join(n.cfg.Dir, "disk") }

// ReplaceDisk gives a node that is off a new, empty disk.
func (n *Node) ReplaceDisk() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.on() {
		return fmt.Errorf("host: replace disk of %s: it is on", n.cfg.Name)
	}
	if diskNeeds() == nil {
		return makeDisk(n.diskFile())
	}
	if err := errors.Join(os.RemoveAll(n.diskDir()), os.MkdirAll(n.diskDir(), 0o700)); err != nil {
		return fmt.Errorf("host: replace disk: %w", err)
	}
	return nil
}

// ClearTPM makes the firmware clear the TPM at the next power-on.
func (n *Node) ClearTPM() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wipe = true
}

// Configure changes what holds from the next power-on on.
func (n *Node) Configure(edit func(*Config)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	edit(&n.cfg)
}

// on is On; mu is held.
func (n *Node) on() bool {
	if n.run == nil {
		return false
	}
	select {
	case <-n.run.done:
		return false
	default:
		return true
	}
}

// On reports whether the node runs, and since when.
func (n *Node) On() (since time.Time, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.on() {
		return time.Time{}, false
	}
	return n.run.since, true
}

// PID is the node's first process, as this process sees it; 0 if it is off.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.on() {
		return 0
	}
	return n.run.cmd.Process.Pid
}

// PowerOn starts the node and returns when its services are being started.
func (n *Node) PowerOn(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.on() {
		return fmt.Errorf("host: power on %s: it is on", n.cfg.Name)
	}
	if err := n.start(ctx); err != nil {
		return fmt.Errorf("host: power on %s: %w", n.cfg.Name, err)
	}
	return nil
}

func (n *Node) start(ctx context.Context) error {
	id := sha256.Sum256([]byte("machine " + n.cfg.Name))
	b := briefing{
		Name: n.cfg.Name, MachineID: hex.EncodeToString(id[:16]), MAC: n.cfg.MAC, Root: filepath.Join(n.cfg.Dir, "root"),
		TPM: n.tpmDir(), ClearTPM: n.wipe, Events: append(n.cfg.Image.Boot(), n.cfg.Extra...), Address: n.cfg.Address,
		Gateway: n.cfg.Gateway, Shared: n.cfg.Shared, Files: n.cfg.Files, Services: n.cfg.Services,
	}
	if _, err := os.Stat(n.diskFile()); err == nil {
		b.DiskFile = n.diskFile()
	} else {
		b.DiskDir = n.diskDir()
	}
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	program := n.cfg.Program
	if program == "" {
		if program, err = os.Executable(); err != nil {
			return err
		}
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(n.cfg.Dir, "first.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return errors.Join(err, ours.Close(), theirs.Close())
	}
	lines, stdout, err := os.Pipe()
	if err != nil {
		return errors.Join(err, ours.Close(), theirs.Close(), log.Close())
	}
	cmd := exec.Command(program, InsideArgs...)
	cmd.Dir = "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(string(text)), stdout, log
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Setsid:     true, Pdeathsig: syscall.SIGKILL,
	}
	r := &running{cmd: cmd, since: time.Now(), done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig follows the thread that started the child (prctl(2)).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_, _, _ = stdout.Close(), theirs.Close(), log.Close()
		started <- err
		if err == nil {
			r.err = cmd.Wait()
			close(r.done)
		}
	}()
	if err := <-started; err != nil {
		return errors.Join(err, ours.Close(), lines.Close())
	}
	go n.relay(lines)
	if err := n.meet(ctx, r, ours); err != nil {
		_ = cmd.Process.Kill()
		<-r.done
		return errors.Join(fmt.Errorf("%w: %s", err, tailOf(filepath.Join(n.cfg.Dir, "first.log"))), n.cfg.Switch.Detach(n.cfg.Name), ours.Close())
	}
	n.run, n.wipe = r, false
	n.ons++
	return nil
}

// meet takes the cable's end from the node's first process, plugs it in, and
// waits for the node to be up.
func (n *Node) meet(ctx context.Context, r *running, conn *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	tap, err := receiveFile(conn)
	if err != nil {
		return err
	}
	if err := n.cfg.Switch.Attach(n.cfg.Name, tap); err != nil {
		return errors.Join(err, tap.Close())
	}
	n.cfg.Switch.Light(n.cfg.Name)
	line, err := bufio.NewReaderSize(conn, 256).ReadString('\n')
	if err != nil {
		return fmt.Errorf("wait for the node: %w", err)
	}
	if !strings.HasPrefix(line, "{") {
		return fmt.Errorf("the node says %q", line)
	}
	_ = conn.SetDeadline(time.Time{})
	r.call = newCaller(conn)
	return nil
}

// relay hands the services' lines on and keeps them in a file per service.
func (n *Node) relay(lines io.ReadCloser) {
	defer lines.Close()
	files := map[string]*os.File{}
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	s := bufio.NewScanner(lines)
	s.Buffer(make([]byte, 64<<10), 2<<20)
	for s.Scan() {
		name, line, ok := strings.Cut(s.Text(), "\t")
		if !ok || filepath.Base(name) != name {
			continue
		}
		f := files[name]
		if f == nil && len(files) < 32 {
			var err error
			if f, err = os.OpenFile(filepath.Join(n.cfg.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err == nil {
				files[name] = f
			}
		}
		if f != nil {
			_, _ = f.WriteString(line + "\n")
		}
		if n.cfg.OnLine != nil {
			n.cfg.OnLine(name, line)
		}
	}
	_, _ = io.Copy(io.Discard, lines)
}

// Cut takes the power away: the cable first, so that nobody hears a dying
// node's goodbye; the disk loses what was not synced; then every process of
// the node ends at once, TPM included. It is no error if the node is off.
func (n *Node) Cut() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.on() {
		n.run = nil
		return n.cfg.Switch.Detach(n.cfg.Name)
	}
	r := n.run
	if err := n.cfg.Switch.Dark(n.cfg.Name, 0); err != nil {
		return err
	}
	var lost error
	if _, err := os.Stat(n.diskFile()); err == nil {
		lost = loseUnsynced(fmt.Sprintf("/proc/%d/root/disk", r.cmd.Process.Pid))
	}
	err := r.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-r.done
	n.run = nil
	return errors.Join(lost, err, r.call.conn.Close(), n.cfg.Switch.Detach(n.cfg.Name))
}

// Close cuts the power for good.
func (n *Node) Close() error { return n.Cut() }

// Done returns a channel that is closed when the node is off.
func (n *Node) Done() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.run == nil {
		c := make(chan struct{})
		close(c)
		return c
	}
	return n.run.done
}

// Output is what a command on a node printed.
type Output struct {
	Stdout, Stderr []byte
	Code           int
}

// Exec runs a program on the node to its end, for a minute at most.
func (n *Node) Exec(ctx context.Context, argv ...string) (Output, error) {
	a, err := n.ask(ctx, request{Op: "exec", Argv: argv})
	if err != nil {
		return Output{}, fmt.Errorf("host: run %s on %s: %w", argv[0], n.cfg.Name, err)
	}
	return Output{a.Stdout, a.Stderr, a.Code}, nil
}

// Start starts a service, Stop ends it for good, Kill kills it with SIGKILL;
// it is started again after a kill.
func (n *Node) Start(ctx context.Context, s Service) error {
	_, err := n.ask(ctx, request{Op: "start", Service: s})
	return err
}

// Stop ends a service in order; see Start.
func (n *Node) Stop(ctx context.Context, service string) error {
	_, err := n.ask(ctx, request{Op: "stop", Service: Service{Name: service}})
	return err
}

// Kill kills a service; see Start.
func (n *Node) Kill(ctx context.Context, service string) error {
	_, err := n.ask(ctx, request{Op: "kill", Service: Service{Name: service}})
	return err
}

// SetAddress gives a running node another address, and keeps it for the next
// power-on.
func (n *Node) SetAddress(ctx context.Context, cidr, gateway string) error {
	n.Configure(func(c *Config) { c.Address, c.Gateway = cidr, gateway })
	_, err := n.ask(ctx, request{Op: "address", Address: cidr, Gateway: gateway})
	return err
}

func (n *Node) ask(ctx context.Context, r request) (answer, error) {
	n.mu.Lock()
	if !n.on() {
		n.mu.Unlock()
		return answer{}, fmt.Errorf("host: %s is off", n.cfg.Name)
	}
	ch, err := n.run.call.call(r)
	n.mu.Unlock()
	if err != nil {
		return answer{}, err
	}
	select {
	case a, ok := <-ch:
		switch {
		case !ok:
			return a, fmt.Errorf("host: %s went off", n.cfg.Name)
		case a.Error != "":
			return a, errors.New(a.Error)
		}
		return a, nil
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
}

func tailOf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "no log"
	}
	if len(b) > 1000 {
		b = b[len(b)-1000:]
	}
	return strings.TrimSpace(string(b))
}
