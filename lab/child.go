package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Child is a long-lived program of the run.
type Child struct {
	// Name is its name in events and of its log file.
	Name string
	// Log is the file with its output.
	Log string

	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// Done is closed when the program has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Err says, after Done, how it ended.
func (c *Child) Err() error {
	if c.err != nil {
		return fmt.Errorf("lab: %s ended: %w: %s", c.Name, c.err, tailOf(c.Log))
	}
	return fmt.Errorf("lab: %s ended: %s", c.Name, tailOf(c.Log))
}

// PID is the process ID inside the run's PID namespace.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Stop asks the program to end and kills it after patience.
func (c *Child) Stop(patience time.Duration) {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-c.done:
	case <-t.C:
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}

// Kill ends the program as a power failure does, and waits until it is gone.
func (c *Child) Kill() {
	_ = c.cmd.Process.Kill() // it may have ended
	<-c.done
}

// Start starts a program that ends with the run. onThread, if given, runs on
// the thread that starts it, before it does.
func (l *Lab) start(name string, argv []string, onThread func() error) (*Child, error) {
	logPath := filepath.Join(l.Dir, name+".log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lab: start %s: %w", name, err)
	}
	defer log.Close() // the child has its own copy
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = l.Dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c := &Child{Name: name, Log: logPath, cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig follows the thread that started the child (prctl(2)). A
		// thread that onThread has moved to another namespace must not serve
		// other goroutines: it stays locked and ends with this goroutine.
		runtime.LockOSThread()
		if onThread == nil {
			defer runtime.UnlockOSThread()
		} else if err := onThread(); err != nil {
			started <- err
			return
		}
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		c.err = cmd.Wait()
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("lab: start %s: %w", name, err)
	}
	l.mu.Lock()
	l.children = append(l.children, c)
	l.mu.Unlock()
	return c, nil
}

// Start starts the muster binary with arguments as a long-lived child.
func (l *Lab) Start(name string, args ...string) (*Child, error) {
	l.Note("lab", "start", name+": muster "+strings.Join(args, " "))
	return l.start(name, append([]string{l.Spec.Program}, args...), nil)
}

// CommandError is a muster command that failed.
type CommandError struct {
	Args   []string
	Code   int
	Stderr string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("lab: muster %s: exit code %d: %s", strings.Join(e.Args, " "), e.Code, e.Stderr)
}

// maxOutput caps what is kept of a command's output.
const maxOutput = 16 << 20

// Muster runs one command of the muster binary to its end and returns what it
// wrote to standard output. Commands are noted in commands.log, so that a
// person can do by hand what the scenario did.
func (l *Lab) Muster(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, l.Spec.Program, args...)
	cmd.Dir = l.Dir
	cmd.WaitDelay = 5 * time.Second
	out, errs := &capped{most: maxOutput}, &capped{most: 64 << 10}
	cmd.Stdout, cmd.Stderr = out, errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// exec.Cmd's Run may hop threads; Pdeathsig wants one that stays.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	l.logCommand(args, err, out.Bytes(), errs.Bytes())
	var exit *exec.ExitError
	switch {
	case err == nil:
		if out.over {
			return nil, fmt.Errorf("lab: muster %s: more than %d bytes of output", args[0], maxOutput)
		}
		return out.Bytes(), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("lab: muster %s: %w", strings.Join(args, " "), ctx.Err())
	case errors.As(err, &exit):
		return out.Bytes(), &CommandError{Args: args, Code: exit.ExitCode(), Stderr: strings.TrimSpace(errs.String())}
	}
	return nil, fmt.Errorf("lab: muster %s: %w", args[0], err)
}

func (l *Lab) logCommand(args []string, err error, out, errs []byte) {
	f, ferr := os.OpenFile(filepath.Join(l.Dir, "commands.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if ferr != nil {
		return
	}
	defer f.Close()
	outcome := "ok"
	if err != nil {
		outcome = err.Error()
	}
	_, _ = fmt.Fprintf(f, "$ muster %s\n# %s\n%s%s\n", strings.Join(args, " "), outcome, clip(out, 4096), clip(errs, 4096))
}

func clip(b []byte, most int) []byte {
	if len(b) > most {
		return append(b[:most:most], "...\n"...)
	}
	return b
}

// capped is a buffer that forgets what goes beyond most.
type capped struct {
	bytes.Buffer
	mu   sync.Mutex
	most int
	over bool
}

func (c *capped) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	room := c.most - c.Len()
	if room < len(p) {
		c.over = true
		_, _ = c.Buffer.Write(p[:max(room, 0)])
		return len(p), nil
	}
	return c.Buffer.Write(p)
}

// tailOf returns the end of a log, for an error text.
func tailOf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "no log"
	}
	s := strings.TrimSpace(string(b))
	if len(s) > 1500 {
		s = "..." + s[len(s)-1500:]
	}
	if s == "" {
		return "it said nothing"
	}
	return s
}

// Clean returns nil if the program has ended with exit code 0.
func (c *Child) Clean() error {
	<-c.done
	if c.err == nil {
		return nil
	}
	return c.Err()
}
