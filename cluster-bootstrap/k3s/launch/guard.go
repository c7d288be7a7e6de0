package launch

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The guard is a second pair of eyes on a candidate's lease, in a process of
// its own: it kills k3s in time even if the launcher was killed, or hangs.
//
// The kernel's own way (PR_SET_PDEATHSIG) does not hold: the setting belongs
// to a thread, and k3s executes itself again from whichever thread it is on.

const (
	guardWord = "guard"
	// guardBefore is when the guard kills: after the launcher had its chance.
	guardBefore = 250 * time.Millisecond
	// guardGrace is how long a guard waits for a k3s whose launcher died in the
	// moment of starting it.
	guardGrace = time.Minute
)

// guard is what `k3s-child guard STATE RUN PLAN` does. It ends when k3s has
// ended or was confirmed. Its input ends when the launcher does.
func guard(args []string) error {
	if len(args) != 3 {
		return errors.New("launch: guard: want state, run and plan")
	}
	p, plan := Paths{State: args[0], Run: args[1]}, args[2]
	boot, err := BootID()
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(gone) }()
	if _, err := fmt.Println("watching"); err != nil {
		return fmt.Errorf("launch: guard: %w", err)
	}
	var alone time.Duration // since when there is no launcher
	var fd *os.File
	for {
		now := Boottime()
		select {
		case <-gone:
			if alone == 0 {
				alone = now
			}
		default:
		}
		if fd == nil {
			var x Process
			if ReadFile(p.ProcessFile(), &x) == nil {
				if fd, err = x.pidfd(); err != nil {
					return err
				}
			}
		}
		switch {
		case fd == nil && alone != 0 && now-alone > guardGrace:
			return nil
		case fd != nil:
			if n, err := p.ReadRole(); err == nil && n.Role == Server {
				return nil // confirmed
			}
			if p.readLease(plan, boot, now)-now <= guardBefore {
				if err := unix.PidfdSendSignal(int(fd.Fd()), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("launch: guard: %w", err)
				}
			}
			if waitGone(context.Background(), fd, 50*time.Millisecond) {
				return nil
			}
		default:
			// A signal that nobody sends: a pause without k3s to wait for.
			_, _ = unix.Poll(nil, 100)
		}
	}
}

// watcher is a running guard.
type watcher struct {
	cmd   *exec.Cmd
	input io.Closer
	done  chan struct{}
}

// startGuard starts a guard and returns when it watches.
func startGuard(cfg Config, plan string) (*watcher, error) {
	argv := append(append([]string{}, cfg.Child[1:]...), guardWord, cfg.Paths.State, cfg.Paths.Run, plan)
	cmd := exec.Command(cfg.Child[0], argv...)
	cmd.Env = environment("")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives us
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("launch: start guard: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("launch: start guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("launch: start guard: %w", err)
	}
	w := &watcher{cmd: cmd, input: in, done: make(chan struct{})}
	// One that does not come up is killed; its output then ends.
	t := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	t.Stop()
	go func() { _ = cmd.Wait(); close(w.done) }()
	if err != nil || line != "watching\n" {
		w.stop()
		return nil, fmt.Errorf("launch: start guard: it did not come up: %w", errors.Join(err, errors.New(line)))
	}
	return w, nil
}

// watches reports whether the guard still runs.
func (w *watcher) watches() bool {
	if w == nil {
		return false
	}
	select {
	case <-w.done:
		return false
	default:
		return true
	}
}

func (w *watcher) pid() int {
	if w == nil {
		return 0
	}
	return w.cmd.Process.Pid
}

// stop ends a guard that has nothing to watch any more.
func (w *watcher) stop() {
	if w == nil {
		return
	}
	_ = w.input.Close()
	_ = w.cmd.Process.Kill() // fails only if it has ended
	<-w.done
}
