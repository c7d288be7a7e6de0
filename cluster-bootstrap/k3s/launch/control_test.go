package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// playSystemctl is systemctl, of one unit, as far as Systemd uses it: start
// returns at once, stop when the main process is gone, and only that one is
// told (KillMode=process).
func playSystemctl(args []string) error {
	dir := filepath.Dir(os.Args[0])
	pidFile := filepath.Join(dir, "main-pid")
	f, err := os.OpenFile(filepath.Join(dir, "systemctl-calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	fmt.Fprintln(f, strings.Join(args, " "))
	f.Close()
	switch args[0] {
	case "reset-failed":
		return errors.New("Unit is not loaded") // as systemd says of a unit that did not fail
	case "start":
		b, err := os.ReadFile(filepath.Join(dir, "exec-start"))
		if err != nil {
			return err
		}
		var command []string
		if err := json.Unmarshal(b, &command); err != nil {
			return err
		}
		cmd := exec.Command(command[0], command[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return err
		}
		p, err := identify(cmd.Process.Pid)
		if err != nil {
			return err
		}
		return WriteFile(pidFile, p)
	case "stop":
		var p Process
		if err := ReadFile(pidFile, &p); errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		return p.End(context.Background(), time.Minute)
	}
	return fmt.Errorf("what is %q", args)
}

// TestControl is the conformance suite of both ways.
func TestControl(t *testing.T) {
	kinds := map[string]func(*testing.T, *world) Control{
		"direct": func(t *testing.T, w *world) Control { return w.control() },
		"systemd, played": func(t *testing.T, w *world) Control {
			w.copySelf(w.dir + "/systemctl")
			b, err := json.Marshal(w.control().Command)
			w.must(err)
			w.must(os.WriteFile(w.dir+"/exec-start", b, 0o600))
			return &Systemd{Paths: w.cfg.Paths, Systemctl: w.dir + "/systemctl"}
		},
		"systemd": func(t *testing.T, w *world) Control {
			if _, err := os.Stat("/run/systemd/system"); err != nil {
				t.Skipf("this host is not run by systemd: %v", err)
			}
			if os.Geteuid() != 0 {
				t.Skip("units are made by root only")
			}
			unit := fmt.Sprintf("muster-k3s-test-%d.service", os.Getpid())
			var start []string
			for _, a := range w.control().Command {
				start = append(start, strconv.Quote(a))
			}
			path := "/run/systemd/system/" + unit
			w.must(os.WriteFile(path, []byte("[Service]\nType=notify\nKillMode=process\nRestart=on-failure\nTimeoutStartSec=infinity\nExecStart="+strings.Join(start, " ")+"\n"), 0o644))
			w.must(exec.Command("systemctl", "daemon-reload").Run())
			t.Cleanup(func() {
				_ = exec.Command("systemctl", "stop", unit).Run()
				_ = os.Remove(path)
				_ = exec.Command("systemctl", "daemon-reload").Run()
			})
			return &Systemd{Unit: unit, Paths: w.cfg.Paths}
		},
	}
	for name, make := range kinds {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, script{Container: true, Stubborn: 200 * time.Millisecond})
			c := make(t, w)
			running := func() bool {
				on, err := c.Running(t.Context())
				w.must(err)
				return on
			}
			w.must(c.Stop(t.Context()))
			if running() {
				t.Error("runs before it was started")
			}
			w.allow(Worker, "")
			w.must(c.Start(t.Context()))
			if !running() {
				t.Error("Start returned before the launcher ran")
			}
			k := w.up()
			w.must(c.Start(t.Context()))
			w.must(c.Stop(t.Context()))
			if running() || k.Alive() {
				t.Error("Stop returned too early")
			}
			pid, err := strconv.Atoi(w.lines("container")[0])
			w.must(err)
			if err := syscall.Kill(pid, 0); err != nil {
				t.Errorf("the container did not survive: %v", err)
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)

			// The launcher is killed; k3s goes on; Stop ends it all the same.
			w.must(c.Start(t.Context()))
			w.until("a second start", func() bool { return len(w.lines("starts")) == 2 })
			k = w.up()
			s, err := w.cfg.Paths.ReadStatus()
			w.must(err)
			w.must(syscall.Kill(s.Launcher.PID, syscall.SIGKILL))
			w.until("the launcher is gone", func() bool { return !s.Launcher.Alive() })
			w.must(c.Stop(t.Context()))
			if k.Alive() || running() {
				t.Error("Stop left a k3s without launcher")
			}
			for _, l := range w.lines("container")[1:] {
				if pid, err := strconv.Atoi(l); err == nil {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			w.never("twice")
			if got := len(w.lines("starts")); name != "systemd" && got != 2 { // systemd starts a killed one again
				t.Errorf("%d starts", got)
			}
		})
	}
}
