package initrd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent/kmod"
)

const (
	// findTime is how long disks may take to appear.
	findTime = 90 * time.Second
	// lastWords is how long a fatal message stays before the restart.
	lastWords = 10 * time.Second
	// watchdogTimeout covers this initrd and the start of systemd, which takes
	// the watchdog over, in seconds.
	watchdogTimeout = 180
	// wholeTime ends an initrd that hangs somewhere, without a watchdog too.
	wholeTime = 3 * time.Minute

	system   = "/sysroot"
	initPath = "/sbin/init"
	// StateFile tells the system what was started, as JSON (State).
	StateFile = "/run/muster-slot.json"

	loaderGUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
	variables  = "/sys/firmware/efi/efivars"
)

// State is what the initrd found out and did.
type State struct {
	Slot     string `json:"slot"`
	Disk     string `json:"disk"`
	RootHash string `json:"root_hash"`
	// Counted: the loader counts this start and nobody has blessed it yet.
	Counted bool `json:"counted"`
}

// ForSlot says whether a command line is that of a slot's image.
func ForSlot(cmdline string) bool {
	for _, w := range strings.Fields(cmdline) {
		if strings.HasPrefix(w, "roothash=") {
			return true
		}
	}
	return false
}

// IsSlot mounts /proc, as PID 1, and says whether this is a slot's initrd.
func IsSlot() bool {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		if mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "") != nil {
			return false
		}
		b, _ = os.ReadFile("/proc/cmdline")
	}
	return ForSlot(string(b))
}

// Run is /init of a slot. It does not return: it becomes the system's init, or
// restarts the machine.
func Run(version string) {
	defer func() {
		if r := recover(); r != nil {
			fail(fmt.Errorf("panic: %v\n%s", r, debug.Stack()))
		}
	}()
	time.AfterFunc(wholeTime, func() { fail(fmt.Errorf("initrd: not done after %s", wholeTime)) })
	started := time.Now()
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=20%"},
	} {
		if err := mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			fail(err)
		}
	}
	say("muster-node %s: slot initrd started", version)
	if err := start(started); err != nil {
		fail(err)
	}
}

func start(started time.Time) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("initrd: read command line: %w", err)
	}
	r, err := parseRoot(string(cmdline))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), findTime)
	defer cancel()
	loader, err := kmod.NewLoader(slog.New(slog.DiscardHandler))
	if err != nil {
		say("note: %v", err)
	}
	go plug(ctx, loader)
	// What is built in is not in the list; what is missing shows itself below.
	for _, name := range []string{"erofs", "dm_verity", "overlay", "efivarfs"} {
		_ = loader.Module(name)
	}
	counted := isCounted()
	found, err := find(ctx, r)
	if err != nil {
		return err
	}
	var problems []error
	for _, c := range found {
		err := enter(c, r, counted)
		if err == nil {
			armWatchdog(loader)
			say("muster-node: slot %s on %s is verified and mounted after %s", c.slot, c.root.name, time.Since(started).Round(10*time.Millisecond))
			return handOver(State{Slot: c.slot.String(), Disk: c.root.disk, RootHash: r.hash, Counted: counted}, c)
		}
		problems = append(problems, fmt.Errorf("slot %s (%s): %w", c.slot, c.root.name, err))
	}
	return errors.Join(problems...)
}

// plug loads drivers for what is there and for what comes.
func plug(ctx context.Context, l *kmod.Loader) {
	const devices = "/sys/devices"
	if fd, err := kmod.Listen(); err == nil {
		defer unix.Close(fd)
		go l.Coldplug(ctx, devices)
		_ = kmod.Read(ctx, fd, func(e kmod.Event) {
			if e.Action == "add" {
				l.Device(e.Modalias)
			}
		}, func() { l.Coldplug(ctx, devices) })
		return
	}
	for ctx.Err() == nil {
		l.Coldplug(ctx, devices)
		time.Sleep(time.Second)
	}
}

// find waits until the slot of the command line is there.
func find(ctx context.Context, r root) ([]candidate, error) {
	seen := map[string]*partition{}
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		var parts []partition
		for _, p := range partitions("/sys/class/block", "/dev", seen) {
			parts = append(parts, *p)
		}
		if found := choose(parts, r); len(found) > 0 {
			return found, nil
		}
		select {
		case <-ctx.Done():
			var list []string
			for _, p := range parts {
				list = append(list, fmt.Sprintf("%s %.36q", p.name, p.label))
			}
			return nil, fmt.Errorf("initrd: after %s no disk has the slot of this image (root %s, hash tree %s); partitions: %s", findTime, r.rootUUID, r.verityUUID, strings.Join(list, ", "))
		case <-t.C:
		}
	}
}

// maxPartitions bounds the search.
const maxPartitions = 512

// partitions lists those of the kernel with what is in them; seen keeps what
// was read before.
func partitions(sys, dev string, seen map[string]*partition) []*partition {
	dirs, _ := filepath.Glob(filepath.Join(sys, "*", "partition"))
	var out []*partition
	for _, d := range dirs[:min(len(dirs), maxPartitions)] {
		dir := filepath.Dir(d)
		name := filepath.Base(dir)
		p := seen[name]
		if p == nil {
			real, err := filepath.EvalSymlinks(dir)
			if err != nil {
				continue
			}
			p = &partition{name: name, disk: filepath.Base(filepath.Dir(real))}
			b, err := os.ReadFile(filepath.Join(dir, "uevent"))
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(b)) {
				if v, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "PARTNAME="); ok {
					p.label = v
				}
			}
			if b, err = os.ReadFile(filepath.Join(dir, "dev")); err != nil {
				continue
			}
			p.device = strings.TrimSpace(string(b))
			// Only what may be a slot is read at all.
			if strings.HasPrefix(p.label, "root-") {
				head, err := readHead(filepath.Join(dev, name))
				if err != nil {
					continue // it may be there in a moment
				}
				p.erofs, p.verity, p.superblock = erofsUUID(head), verityUUID(head), head
			}
			seen[name] = p
		}
		out = append(out, p)
	}
	return out
}

func readHead(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, superblockBytes)
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	return b, nil
}

// enter mounts a slot at /sysroot.
func enter(c candidate, r root, counted bool) error {
	salt, err := veritySalt(c.verity.superblock, r)
	if err != nil {
		return err
	}
	// While the loader counts, a restart leads on: to another try and then to
	// the system before. Later it would lead in a circle, and a system with a
	// bad block that can still say so is worth more.
	dev, err := openVerity(c, r, salt, counted)
	if err != nil {
		return err
	}
	if err := waitFor(dev); err != nil {
		return errors.Join(err, closeVerity())
	}
	if err := mount(dev, system, "erofs", unix.MS_RDONLY, ""); err != nil {
		return errors.Join(err, closeVerity())
	}
	// Not followed: the link is absolute, and this is not its root yet.
	if _, err := os.Lstat(system + initPath); err != nil {
		return errors.Join(fmt.Errorf("initrd: %w", err), unix.Unmount(system, 0), closeVerity())
	}
	return nil
}

func waitFor(dev string) error {
	for range 100 {
		if _, err := os.Stat(dev); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("initrd: %s does not appear", dev)
}

// handOver prepares what the system finds and becomes its init.
func handOver(s State, c candidate) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(StateFile, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	// The root is read-only. /etc may be written and forgets; /var is empty
	// until data is there.
	const upper, work = "/run/muster-etc/upper", "/run/muster-etc/work"
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("initrd: %w", err)
		}
	}
	if err := mount("etc", system+"/etc", "overlay", unix.MS_NOSUID|unix.MS_NODEV, "lowerdir="+system+"/etc,upperdir="+upper+",workdir="+work); err != nil {
		return err
	}
	for _, m := range []struct{ target, data string }{{"/var", "mode=0755,size=50%"}, {"/tmp", "mode=1777,size=25%"}} {
		if err := mount("tmpfs", system+m.target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, m.data); err != nil {
			return err
		}
	}
	if err := identify(c.root.disk); err != nil {
		say("note: %v", err)
	}
	for _, m := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(m, system+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("initrd: move %s: %w", m, err)
		}
	}
	// The initrd's files are memory that nobody would ever give back.
	for _, d := range []string{"/lib", "/etc", "/init"} {
		_ = os.RemoveAll(d)
	}
	if err := unix.Chdir(system); err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("initrd: move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("initrd: change root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	return fmt.Errorf("initrd: start %s: %w", initPath, unix.Exec(initPath, []string{initPath}, []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "TERM=linux"}))
}

// isCounted asks the loader's variable (Boot Loader Interface).
func isCounted() bool {
	_ = mount("efivarfs", variables, "efivarfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	_, err := os.Stat(filepath.Join(variables, "LoaderBootCountPath-"+loaderGUID))
	return err == nil
}

// askForRecovery makes the loader start recovery once: for a system that was
// good before and does not come up any more. While the loader counts, its own
// choice is better.
func askForRecovery() {
	if isCounted() {
		return
	}
	b := []byte{7, 0, 0, 0} // non-volatile, boot services, runtime
	for _, c := range "recovery-*\x00" {
		b = append(b, byte(c), 0)
	}
	name := filepath.Join(variables, "LoaderEntryOneShot-"+loaderGUID)
	if err := os.WriteFile(name, b, 0o644); err != nil {
		say("note: recovery cannot be asked for: %v", err)
		return
	}
	say("the next start is recovery")
}

// armWatchdog arms the first watchdog and leaves it ticking: systemd takes it
// over, and if systemd never comes up, it ends this start.
func armWatchdog(l *kmod.Loader) {
	const device = "/dev/watchdog0"
	if _, err := os.Stat(device); errors.Is(err, fs.ErrNotExist) {
		_ = l.Module("softdog") // better than none
	}
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		say("note: no watchdog: %v", err)
		return
	}
	// WDIOC_SETTIMEOUT, linux/watchdog.h. A driver with a fixed time refuses.
	_ = unix.IoctlSetPointerInt(int(f.Fd()), 0xc0045706, watchdogTimeout)
	// Closed without the letter V, it goes on.
	_ = f.Close()
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("initrd: mount %s: %w", target, err)
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("initrd: mount %s on %s: %w", kind, target, err)
	}
	return nil
}

// say puts a line into the kernel's log, at a level that consoles show even
// when they are quiet.
func say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		fmt.Fprintln(os.Stderr, text)
		return
	}
	defer f.Close()
	for line := range bytes.Lines([]byte(text)) {
		_, _ = f.Write(append([]byte("<3>"), bytes.TrimRight(line, "\n")...))
	}
}

// fail says why and restarts the machine.
func fail(err error) {
	say("muster-node: this slot does not start: %v", err)
	askForRecovery()
	say("muster-node: restarting in %s", lastWords)
	time.Sleep(lastWords)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	// PID 1 that ends is a panic, and that restarts too.
	os.Exit(1)
}
