package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// BecomeK3s writes this process into the process file and becomes k3s:
// args are process file, program, its arguments. Since the process writes
// itself down before it is k3s, there is no moment in which a k3s of ours runs
// that nobody could find again. It returns only if it fails.
//
// With "guard" as the first argument it watches a candidate's lease instead,
// and returns nil when there is nothing to watch any more.
func BecomeK3s(args []string) error {
	if len(args) > 0 && args[0] == guardWord {
		return guard(args[1:])
	}
	if len(args) < 2 {
		return errors.New("launch: become k3s: want process file, program and arguments")
	}
	me, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	if err := WriteFile(args[0], me); err != nil {
		return err
	}
	return fmt.Errorf("launch: become k3s: %w", syscall.Exec(args[1], args[1:], os.Environ()))
}

// child is a k3s that was started.
type child struct {
	running
	plan    string
	process Process
	cmd     *exec.Cmd
	done    chan struct{}
	exit    string // valid after done
	killed  bool
	guard   *watcher // candidates only
}

// environment is what k3s gets: nothing that would change what the config
// says.
func environment(notify string) []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "K3S_") && !strings.HasPrefix(e, "NOTIFY_SOCKET=") && !strings.HasPrefix(e, "WATCHDOG_") &&
			!strings.HasPrefix(e, "LISTEN_") {
			env = append(env, e)
		}
	}
	if notify != "" {
		env = append(env, notify)
	}
	return env
}

// StartMark begins the line of the log that separates one run of k3s from the
// next.
const StartMark = "--- muster starts"

// startChild starts k3s, which outlives this process. tied: the kernel kills
// it with this process, as far as that holds (see guard.go); whoever comes
// next ends it anyway.
func startChild(cfg Config, args []string, tied bool, notify string) (*child, error) {
	out := os.Stdout
	if !cfg.Journal {
		if err := os.MkdirAll(filepath.Dir(cfg.Paths.LogFile()), 0o700); err != nil {
			return nil, fmt.Errorf("launch: start k3s: %w", err)
		}
		// k3s gets the file itself, not a pipe: it must not die of a broken
		// pipe when the launcher does.
		f, err := os.OpenFile(cfg.Paths.LogFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, fmt.Errorf("launch: start k3s: %w", err)
		}
		defer f.Close()
		out = f
		fmt.Fprintf(f, "%s k3s %s, CLOCK_BOOTTIME %s\n", StartMark, args[0], Boottime())
	}
	argv := append(append([]string{}, cfg.Child[1:]...), cfg.Paths.ProcessFile(), cfg.Binary)
	cmd := exec.Command(cfg.Child[0], append(argv, args...)...)
	cmd.Env = environment(notify)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if tied {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	c := &child{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The signal of prctl(PR_SET_PDEATHSIG) comes when the *thread* ends
		// that started the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // says nothing that counts
		c.exit = cmd.ProcessState.String()
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("launch: start k3s: %w", err)
	}
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		// It ended at once; done will say so.
		p = Process{PID: cmd.Process.Pid}
	}
	c.process = p
	return c, nil
}

// signal ends k3s, by force or in order. Its children are left alone:
// containers go on, as with KillMode=process.
func (c *child) signal(force bool) {
	if force {
		_ = c.cmd.Process.Kill() // fails only if it is gone
		return
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
}

// Once runs k3s with args until it ends by itself, under the same lock and
// rules as the launcher: for cluster-reset. It is killed with the caller, and
// when ctx ends. That it ended says nothing; the caller looks at the files.
func Once(ctx context.Context, cfg Config, args []string) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	cfg = cfg.withDefaults()
	held, err := lock(cfg.Paths)
	if err != nil {
		return err
	}
	defer held.Close()
	if old := cfg.Paths.K3s(); old != nil {
		if err := old.End(ctx, cfg.StopTimeout); err != nil {
			return err
		}
	}
	if why := (&Launcher{cfg: cfg}).obstacle(); why != "" {
		return errors.New("launch: run k3s once: " + why)
	}
	c, err := startChild(cfg, args, true, "")
	if err != nil {
		return err
	}
	defer Remove(cfg.Paths.ProcessFile())
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
	}
	c.signal(false)
	t := time.NewTimer(cfg.StopTimeout)
	defer t.Stop()
	select {
	case <-c.done:
	case <-t.C:
		c.signal(true)
		<-c.done
	}
	return fmt.Errorf("launch: run k3s once: %w", ctx.Err())
}
