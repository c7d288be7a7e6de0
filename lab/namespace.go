package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// InsideArgs are the arguments with which the program starts itself again as
// the first process of the namespaces.
var InsideArgs = []string{"lab", "inside"}

// briefing is what the process inside is told on standard input.
type briefing struct {
	Spec Spec `json:"spec"`
	// BeganAgo is how long the run lasts already: monotonic clocks cannot be
	// handed over.
	BeganAgo time.Duration `json:"began_ago"`
	// Result holds what the preparation found.
	Result Result `json:"result"`
}

// inside is the running process in the namespaces.
type inside struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// enterNamespaces starts this program again as PID 1 of new network, mount,
// PID, UTS and IPC namespaces.
//
// When that process ends, however it ends, the kernel kills every process of
// its PID namespace and drops the network namespace with all interfaces
// (pid_namespaces(7)). attached ties its own life to ours: the kernel kills
// it when we die. So nothing is left behind even after kill -9.
func enterNamespaces(b briefing, attached bool, stdout, stderr io.Writer) (*inside, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("lab: enter namespaces: %w", err)
	}
	text, err := json.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("lab: enter namespaces: %w", err)
	}
	cmd := exec.Command(self, InsideArgs...)
	cmd.Stdin = bytes.NewReader(text)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Env = append(os.Environ(), "MUSTER_LAB_RUN="+b.Spec.Dir)
	cmd.Dir = b.Spec.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		// Ctrl-C of a terminal reaches us only; we end the inside in order.
		Setsid: true,
	}
	if attached {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	in := &inside{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig is sent when the *thread* that started the child ends
		// (prctl(2)), so that thread is kept until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		in.err = cmd.Wait()
		close(in.done)
	}()
	if err := <-started; err != nil {
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOSPC) {
			return nil, &Unable{Reason: fmt.Sprintf("new namespaces are refused here (%v): root with CAP_SYS_ADMIN is needed; a container must be --privileged", err)}
		}
		return nil, fmt.Errorf("lab: enter namespaces: %w", err)
	}
	return in, nil
}

// stop ends the inside in order, and by force after patience.
func (in *inside) stop(patience time.Duration) {
	_ = in.cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-in.done:
	case <-t.C:
		_ = in.cmd.Process.Kill()
		<-in.done
	}
}

// settle makes the namespaces of this process usable: mounts stay private,
// /proc shows our processes, /sys our interfaces.
func settle() error {
	if os.Getpid() != 1 {
		return errors.New("lab: settle in namespaces: not the first process of a PID namespace (this command is started by `muster lab run`)")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("lab: make mounts private: %w", err)
	}
	// A fresh sysfs hides the control groups, which k3s cannot start without.
	groups, groupsErr := unix.OpenTree(unix.AT_FDCWD, "/sys/fs/cgroup", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("lab: mount %s: %w", m.at, err)
		}
	}
	if groupsErr == nil { // a host without them is no reason to fail
		err := unix.MoveMount(groups, "", unix.AT_FDCWD, "/sys/fs/cgroup", unix.MOVE_MOUNT_F_EMPTY_PATH)
		if err = errors.Join(err, unix.Close(groups)); err != nil {
			return fmt.Errorf("lab: keep the control groups: %w", err)
		}
	}
	if err := unix.Sethostname([]byte("muster-lab")); err != nil {
		return fmt.Errorf("lab: set host name: %w", err)
	}
	return nil
}

// processStart returns the start time of a process in clock ticks since boot
// (field 22 of proc_pid_stat(5)), which together with the PID names a process
// for as long as the host runs.
func processStart(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("lab: read process %d: %w", pid, err)
	}
	// The name, field 2, is in brackets and may hold anything.
	end := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[end+1:]))
	if end < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("lab: read process %d: unknown format", pid)
	}
	// The first thread of a program with several is a zombie before the last
	// one has ended; as first process of a PID namespace that one still waits
	// for every other process to be gone. Field 20 counts the threads.
	if threads := fields[17]; fields[0] == "Z" && (threads == "0" || threads == "1") {
		return 0, fmt.Errorf("lab: read process %d: it has ended", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("lab: read process %d: %w", pid, err)
	}
	return start, nil
}
