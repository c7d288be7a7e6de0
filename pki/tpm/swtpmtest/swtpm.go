package swtpmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ErrMissing says that swtpm is not installed on this machine.
var ErrMissing = errors.New("swtpmtest: swtpm and swtpm_setup are not installed")

// Options say what kind of TPM to make. The zero value is a TPM with EK
// certificates of an authority in the TPM's own directory, an active SHA-256
// bank, listening on a unix socket.
type Options struct {
	// CADir is the EK authority's directory; made if missing. Default: DIR/ca.
	// Give TPMs the same directory to make them the same "vendor's".
	CADir string
	// Intermediate makes a new authority with an issuing CA below its root.
	Intermediate bool
	// NoCertificate leaves the EK without certificate, as cheap TPMs do.
	NoCertificate bool
	// Banks are the active PCR banks, e.g. "sha1,sha256". Default "sha256".
	Banks string
	// ForQEMU starts swtpm with the control channel only: QEMU hands it the
	// data channel (-chardev socket,path=ControlPath -tpmdev emulator). Path
	// is then "".
	ForQEMU bool
	// Stopped makes the TPM without starting it; call Start.
	Stopped bool
}

// TPM is a software TPM with its state in a directory.
type TPM struct {
	// Dir holds state, sockets and log.
	Dir string
	// CA is the EK authority.
	CA *CA

	opts Options
	cmd  *exec.Cmd
	done chan struct{}
}

// New makes a TPM with its state in dir and starts it. State that is already
// there is used again: same EK, same owner seed. It returns ErrMissing when
// the programs are not installed. dir should be short: a socket's path has at
// most 107 bytes.
func New(dir string, o Options) (*TPM, error) {
	for _, p := range []string{"swtpm", "swtpm_setup"} {
		if _, err := exec.LookPath(p); err != nil {
			return nil, fmt.Errorf("%w (%s)", ErrMissing, p)
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("swtpmtest: make TPM: %w", err)
	}
	if o.CADir == "" {
		o.CADir = filepath.Join(dir, "ca")
	}
	if o.Banks == "" {
		o.Banks = "sha256"
	}
	t := &TPM{Dir: dir, opts: o}
	if len(t.ControlPath()) > 107 {
		return nil, fmt.Errorf("swtpmtest: make TPM: directory %s is too long for a unix socket", dir)
	}
	if t.CA, err = OpenCA(o.CADir, o.Intermediate); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(t.stateDir(), "tpm2-00.permall")); errors.Is(err, os.ErrNotExist) {
		if err := t.manufacture(); err != nil {
			return nil, err
		}
	}
	if o.Stopped {
		return t, nil
	}
	return t, t.Start()
}

// TB is what Start needs of a *testing.T. The lab, which is no test, uses this
// package too and does not want to link package testing.
type TB interface {
	Helper()
	Cleanup(func())
	Fatal(args ...any)
	Skipf(format string, args ...any)
}

// Start makes a TPM in a temporary directory of the test and ends it with the
// test. It skips the test, with the reason, where swtpm is not installed.
func Start(tb TB, o Options) *TPM {
	tb.Helper()
	// Not tb.TempDir: its path holds the test's name and gets too long for a
	// unix socket.
	dir, err := os.MkdirTemp("", "swtpm")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	t, err := New(dir, o)
	if errors.Is(err, ErrMissing) {
		tb.Skipf("needs a software TPM: %v", err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = t.Close() })
	return t
}

// Path is the unix socket for TPM commands ("" with ForQEMU). swtpm serves
// one connection at a time; a client that keeps it starves the others.
func (t *TPM) Path() string {
	if t.opts.ForQEMU {
		return ""
	}
	return filepath.Join(t.Dir, "tpm")
}

// ControlPath is the unix socket of swtpm's control channel.
func (t *TPM) ControlPath() string { return filepath.Join(t.Dir, "tpm.ctrl") }

// RootPEM returns the EK authority's certificates; see CA.RootPEM.
func (t *TPM) RootPEM() []byte { return t.CA.RootPEM() }

// PID is swtpm's process ID, 0 when it does not run.
func (t *TPM) PID() int {
	if t.cmd == nil {
		return 0
	}
	return t.cmd.Process.Pid
}

func (t *TPM) stateDir() string { return filepath.Join(t.Dir, "state") }

// manufacture makes the TPM's seeds, its EKs and their certificates.
func (t *TPM) manufacture() error {
	if err := os.MkdirAll(t.stateDir(), 0o700); err != nil {
		return fmt.Errorf("swtpmtest: make TPM: %w", err)
	}
	files := map[string]string{
		"setup.conf": "create_certs_tool = " + lookPath("swtpm_localca") + "\n" +
			"create_certs_tool_config = " + filepath.Join(t.Dir, "localca.conf") + "\n" +
			"create_certs_tool_options = " + filepath.Join(t.Dir, "localca.options") + "\n" +
			"active_pcr_banks = " + t.opts.Banks + "\n",
		"localca.conf": "statedir = " + t.CA.Dir + "\n" +
			"signingkey = " + filepath.Join(t.CA.Dir, keyFile) + "\n" +
			"issuercert = " + filepath.Join(t.CA.Dir, issuerFile) + "\n" +
			"certserial = " + filepath.Join(t.CA.Dir, "serial") + "\n",
		"localca.options": "--platform-manufacturer muster\n--platform-version 1\n--platform-model lab\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(t.Dir, name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("swtpmtest: make TPM: %w", err)
		}
	}
	args := []string{"--tpm2", "--tpmstate", t.stateDir(), "--config", filepath.Join(t.Dir, "setup.conf"),
		"--pcr-banks", t.opts.Banks, "--logfile", filepath.Join(t.Dir, "setup.log")}
	if os.Geteuid() == 0 {
		args = append(args, "--runas", "root")
	}
	if t.opts.NoCertificate {
		args = append(args, "--createek")
	} else {
		args = append(args, "--create-ek-cert")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "swtpm_setup", args...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+t.Dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(t.Dir, "setup.log"))
		return fmt.Errorf("swtpmtest: make TPM: swtpm_setup: %w\n%s%s", err, tail(out), tail(log))
	}
	return nil
}

// Start starts a stopped TPM: power-on. It returns when the TPM answers.
func (t *TPM) Start() error {
	if t.cmd != nil {
		return errors.New("swtpmtest: start TPM: it runs already")
	}
	args := []string{"socket", "--tpm2", "--tpmstate", "dir=" + t.stateDir() + ",mode=0600",
		"--ctrl", "type=unixio,path=" + t.ControlPath(), "--log", "file=" + filepath.Join(t.Dir, "swtpm.log")}
	wait := t.ControlPath()
	if !t.opts.ForQEMU {
		args = append(args, "--server", "type=unixio,path="+t.Path(), "--flags", "not-need-init,startup-clear")
		wait = t.Path()
	}
	_ = os.Remove(t.ControlPath())
	_ = os.Remove(t.Path())
	cmd := exec.Command("swtpm", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error), make(chan struct{})
	go func() {
		// Linux sends Pdeathsig when the *thread* that started the child ends
		// (prctl(2)), so one thread is kept for it until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(done)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("swtpmtest: start TPM: %w", err)
	}
	t.cmd, t.done = cmd, done
	if err := answers(wait, done); err != nil {
		_ = t.Close()
		return fmt.Errorf("swtpmtest: start TPM: %w\n%s", err, tail(out.Bytes()))
	}
	return nil
}

// Restart is a power cycle: PCRs are zero again, seeds and NV remain.
func (t *TPM) Restart() error {
	if err := t.Close(); err != nil {
		return err
	}
	return t.Start()
}

// Close kills the TPM, as losing power does; the state stays in Dir.
func (t *TPM) Close() error {
	if t.cmd == nil {
		return nil
	}
	err := t.cmd.Process.Kill()
	<-t.done
	t.cmd = nil
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("swtpmtest: stop TPM: %w", err)
	}
	return nil
}

// answers polls until somebody listens on the socket, for at most 10 s.
func answers(path string, done <-chan struct{}) error {
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", path); err == nil {
			return c.Close()
		}
		select {
		case <-done:
			return errors.New("swtpm ended at once")
		case <-deadline.C:
			return fmt.Errorf("nobody listens on %s after 10 s", path)
		case <-tick.C:
		}
	}
}

func lookPath(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return "/usr/bin/" + name
}

// tail returns the end of a program's output, enough for an error text.
func tail(b []byte) string {
	s := strings.TrimSpace(string(b))
	if len(s) > 2000 {
		s = "..." + s[len(s)-2000:]
	}
	return s
}
