package launch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a process in this boot: a PID alone may name another one later.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // field 22 of /proc/PID/stat, clock ticks
	Boot  string `json:"boot"`  // boot ID of the kernel
}

// BootID is the kernel's name for this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("launch: read boot ID: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Boottime is CLOCK_BOOTTIME: it never jumps, and goes on while the machine is
// suspended, so that a lease ends in time.
func Boottime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		// Linux has it since 2.6.39; without it no lease could be kept.
		panic("launch: read CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(t.Nano())
}

// parseStat returns state, parent and start time of a /proc/PID/stat. The name
// in it may hold anything, brackets and spaces included.
func parseStat(b []byte) (state byte, start uint64, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, errors.New("launch: read stat: no name")
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return 0, 0, errors.New("launch: read stat: too short")
	}
	start, err = strconv.ParseUint(string(f[19]), 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("launch: read stat: start time: %w", err)
	}
	return f[0][0], start, nil
}

// identify returns what identifies pid.
func identify(pid int) (Process, error) {
	boot, err := BootID()
	if err != nil {
		return Process{}, err
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Process{}, fmt.Errorf("launch: identify process %d: %w", pid, err)
	}
	_, start, err := parseStat(b)
	if err != nil {
		return Process{}, err
	}
	return Process{PID: pid, Start: start, Boot: boot}, nil
}

// Alive reports whether this very process still runs. One that only waits to
// be collected by its parent does not.
func (p *Process) Alive() bool {
	if p == nil || p.PID <= 0 {
		return false
	}
	if boot, err := BootID(); err != nil || boot != p.Boot {
		return false
	}
	dir := "/proc/" + strconv.Itoa(p.PID)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return false
	}
	state, start, err := parseStat(b)
	if err != nil || start != p.Start {
		return false
	}
	if state == 'Z' || state == 'X' {
		// The first thread ended; others may go on.
		t, err := os.ReadDir(dir + "/task")
		return err == nil && len(t) > 1
	}
	return true
}

// pidfd returns a handle that can never mean another process; nil if p is gone.
func (p *Process) pidfd() (*os.File, error) {
	if !p.Alive() {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("launch: open process %d: %w", p.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	if !p.Alive() { // checked after opening: the PID may have been reused before
		_ = f.Close()
		return nil, nil
	}
	return f, nil
}

// waitGone waits until the process behind fd ended, or for d, or until ctx
// ends; it reports whether it ended.
func waitGone(ctx context.Context, fd *os.File, d time.Duration) bool {
	end := Boottime() + d
	for {
		// Short polls, so that ctx counts too; a pidfd is readable when all
		// threads are gone.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd.Fd()), Events: unix.POLLIN}}, 100)
		if err == nil && n > 0 {
			return true
		}
		if ctx.Err() != nil || Boottime() >= end {
			return false
		}
	}
}

// End ends p in order, by force after patience, and returns when it is gone.
// Its children (containers) are left alone.
func (p *Process) End(ctx context.Context, patience time.Duration) error {
	if p == nil {
		return nil
	}
	fd, err := p.pidfd()
	if err != nil || fd == nil {
		return err
	}
	defer fd.Close()
	for _, s := range []struct {
		sig  syscall.Signal
		wait time.Duration
	}{{unix.SIGTERM, patience}, {unix.SIGKILL, time.Minute}} {
		if err := unix.PidfdSendSignal(int(fd.Fd()), s.sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("launch: end process %d: %w", p.PID, err)
		}
		if waitGone(ctx, fd, s.wait) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("launch: end process %d: %w", p.PID, err)
		}
	}
	return fmt.Errorf("launch: end process %d: it survived SIGKILL: it hangs in the kernel", p.PID)
}

// Ask tells p to end and does not wait for it.
func (p *Process) Ask() error {
	fd, err := p.pidfd()
	if err != nil || fd == nil {
		return err
	}
	defer fd.Close()
	if err := unix.PidfdSendSignal(int(fd.Fd()), unix.SIGTERM, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("launch: ask process %d to end: %w", p.PID, err)
	}
	return nil
}

// tools are names under which the k3s program is no server and no agent. The
// kernel sets them from the file that was executed, unlike arguments.
var tools = map[string]bool{"kubectl": true, "crictl": true, "ctr": true}

// strangers returns the processes in this network namespace that run binary or
// what it unpacked below data, other than this process: some k3s that
// the launcher did not start. Containers have namespaces of their own.
func strangers(binary, data string) ([]int, error) {
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("launch: look for k3s processes: %w", err)
	}
	programs := []string{binary}
	for _, g := range []string{"k3s", "k3s-server", "k3s-agent", "containerd"} {
		m, _ := filepath.Glob(filepath.Join(data, "data", "*", "bin", g)) // only a bad pattern fails
		programs = append(programs, m...)
	}
	var infos []os.FileInfo
	for _, p := range programs {
		if fi, err := os.Stat(p); err == nil {
			infos = append(infos, fi)
		}
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("launch: look for k3s processes: %w", err)
	}
	var found []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		at := "/proc/" + d.Name()
		if ns, err := os.Readlink(at + "/ns/net"); err != nil || ns != ours {
			continue
		}
		fi, err := os.Stat(at + "/exe")
		if err != nil {
			continue
		}
		comm, err := os.ReadFile(at + "/comm")
		if err != nil || tools[strings.TrimSpace(string(comm))] {
			continue
		}
		for _, i := range infos {
			if os.SameFile(fi, i) {
				found = append(found, pid)
				break
			}
		}
	}
	return found, nil
}

// listening returns those of ports on which something in this network
// namespace listens.
func listening(ports []int) ([]int, error) {
	used := map[int]bool{}
	for _, f := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("launch: look for ports in use: %w", err)
		}
		parseListeners(b, used)
	}
	var out []int
	for _, p := range ports {
		if used[p] {
			out = append(out, p)
		}
	}
	return out, nil
}

// parseListeners reads lines of /proc/net/tcp: "sl local rem st ...", state 0A
// is LISTEN.
func parseListeners(b []byte, used map[int]bool) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != "0A" {
			continue
		}
		_, hex, ok := strings.Cut(f[1], ":")
		if !ok {
			continue
		}
		if p, err := strconv.ParseUint(hex, 16, 16); err == nil {
			used[int(p)] = true
		}
	}
}
