package machine

import (
	"context"
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

	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// Machine is one virtual PC. Its methods may be called from any goroutine.
type Machine struct {
	cfg    Config
	fw     firmware
	serial *Serial
	tpm    *swtpmtest.TPM

	name, mac, uuid string // never change; cfg does, under mu

	mu  sync.Mutex
	run *running // nil when off
	ons int      // how often it was switched on
}

// running is what exists between power-on and power-off.
type running struct {
	cmd     *exec.Cmd
	qmp     *QMP
	since   time.Time
	done    chan struct{} // closed when QEMU has ended and the console is read
	waitErr error         // valid after done
}

// New makes a machine that is off. What is in cfg.Dir already (TPM state,
// firmware variables) is used again.
func New(cfg Config) (*Machine, error) {
	cfg = cfg.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	fw, err := findFirmware(cfg.SecureBoot)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("machine: make %s: %w", cfg.Name, err)
	}
	m := &Machine{cfg: cfg, fw: fw, serial: NewSerial(cfg.OnLine), name: cfg.Name, mac: cfg.MAC, uuid: cfg.UUID}
	if vars := (files{cfg.Dir}).vars(); !exists(vars) {
		if err := copyFile(vars, fw.vars); err != nil {
			return nil, fmt.Errorf("machine: make firmware variables of %s: %w", cfg.Name, err)
		}
	}
	if !cfg.NoTPM {
		m.tpm, err = swtpmtest.New(files{cfg.Dir}.tpm(), swtpmtest.Options{
			CADir: cfg.TPMAuthority, NoCertificate: cfg.TPMWithoutCertificate, ForQEMU: true, Stopped: true,
		})
		if err != nil {
			return nil, fmt.Errorf("machine: make TPM of %s: %w", cfg.Name, err)
		}
	}
	return m, nil
}

// Name returns the machine's name.
func (m *Machine) Name() string { return m.name }

// MAC returns the card's address.
func (m *Machine) MAC() string { return m.mac }

// UUID returns the SMBIOS UUID.
func (m *Machine) UUID() string { return m.uuid }

// Serial returns the console; it outlives power cycles.
func (m *Machine) Serial() *Serial { return m.serial }

// Captures returns the packet capture files of the card, one for each time the
// machine was switched on, oldest first.
func (m *Machine) Captures() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cfg.Tap == "" {
		return nil
	}
	var out []string
	for n := 1; n <= m.ons; n++ {
		out = append(out, files{m.cfg.Dir}.pcap(n))
	}
	return out
}

// Rebuild changes a machine that is off, as somebody with a screwdriver or in
// the firmware's setup does. It stays the same machine: name, directory (and
// with it TPM and firmware variables), addresses and Secure Boot cannot change.
func (m *Machine) Rebuild(edit func(*Config)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run != nil {
		return fmt.Errorf("machine: rebuild %s: it is on", m.name)
	}
	old, cfg := m.cfg, m.cfg
	edit(&cfg)
	if cfg.Name != old.Name || cfg.Dir != old.Dir || cfg.MAC != old.MAC || cfg.Tap != old.Tap || cfg.UUID != old.UUID ||
		cfg.SecureBoot != old.SecureBoot || cfg.NoTPM != old.NoTPM {
		return fmt.Errorf("machine: rebuild %s: that would be another machine", m.name)
	}
	cfg = cfg.defaults()
	if err := cfg.validate(); err != nil {
		return err
	}
	m.cfg = cfg
	return nil
}

// LoseNVRAM puts the firmware variables of a machine that is off back to what
// the board was made with, as an empty battery or a firmware update does: boot
// entries and their order are gone. With Secure Boot the test keys are what it
// was made with.
func (m *Machine) LoseNVRAM() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run != nil {
		return fmt.Errorf("machine: lose NVRAM of %s: it is on", m.name)
	}
	vars := (files{m.cfg.Dir}).vars()
	if err := os.Remove(vars); err != nil {
		return fmt.Errorf("machine: lose NVRAM of %s: %w", m.name, err)
	}
	if err := copyFile(vars, m.fw.vars); err != nil {
		return fmt.Errorf("machine: lose NVRAM of %s: %w", m.name, err)
	}
	return nil
}

// Clock reads the real-time clock (UTC), as the firmware of the next boot
// will; the system that runs may have set it.
func (m *Machine) Clock(ctx context.Context) (time.Time, error) {
	m.mu.Lock()
	run := m.run
	m.mu.Unlock()
	if run == nil {
		return time.Time{}, fmt.Errorf("machine: read clock of %s: it is off", m.name)
	}
	b, err := run.qmp.Execute(ctx, "qom-get", map[string]string{"path": "/machine", "property": "rtc-time"})
	if err != nil {
		return time.Time{}, fmt.Errorf("machine: read clock of %s: %w", m.name, err)
	}
	var t struct { // struct tm of C
		Year int `json:"tm_year"`
		Mon  int `json:"tm_mon"`
		Day  int `json:"tm_mday"`
		Hour int `json:"tm_hour"`
		Min  int `json:"tm_min"`
		Sec  int `json:"tm_sec"`
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return time.Time{}, fmt.Errorf("machine: read clock of %s: %w", m.name, err)
	}
	return time.Date(1900+t.Year, time.Month(1+t.Mon), t.Day, t.Hour, t.Min, t.Sec, 0, time.UTC), nil
}

// PowerOn starts the machine and returns when QEMU runs; the firmware is at
// its first instructions then.
func (m *Machine) PowerOn(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run != nil {
		select {
		case <-m.run.done:
			m.finish()
		default:
			return fmt.Errorf("machine: power on %s: it is on", m.cfg.Name)
		}
	}
	control := ""
	if m.tpm != nil {
		// swtpm ends with the QEMU that used it: Close only collects it.
		_ = m.tpm.Close()
		if err := m.tpm.Start(); err != nil {
			return fmt.Errorf("machine: power on %s: %w", m.cfg.Name, err)
		}
		control = m.tpm.ControlPath()
	}
	if err := m.start(ctx, control); err != nil {
		if m.tpm != nil {
			_ = m.tpm.Close()
		}
		return fmt.Errorf("machine: power on %s: %w", m.cfg.Name, err)
	}
	return nil
}

func (m *Machine) start(ctx context.Context, control string) error {
	f := files{m.cfg.Dir}
	_ = os.Remove(f.qmp())
	args := m.cfg.args(m.fw, control, m.ons+1)
	text := QEMU + " " + strings.Join(args, " ") + "\n"
	if err := os.WriteFile(filepath.Join(m.cfg.Dir, "command-line"), []byte(text), 0o644); err != nil {
		return err
	}
	qemuLog, err := os.OpenFile(f.qemu(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer qemuLog.Close() // QEMU has its own copy
	serialLog, err := os.OpenFile(f.serial(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	console, output, err := os.Pipe()
	if err != nil {
		_ = serialLog.Close()
		return err
	}
	// Standard input stays open and silent: QEMU would take its end for the
	// end of the console.
	input, silent, err := os.Pipe()
	if err != nil {
		_, _, _ = serialLog.Close(), console.Close(), output.Close()
		return err
	}
	cmd := exec.Command(QEMU, args...)
	cmd.Dir = m.cfg.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = input, output, qemuLog
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}

	r := &running{cmd: cmd, since: time.Now(), done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// Pdeathsig follows the thread that started the child (prctl(2)).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		_, _ = input.Close(), output.Close()
		started <- err
		if err != nil {
			_, _, _ = serialLog.Close(), console.Close(), silent.Close()
			return
		}
		_ = m.serial.Follow(console, serialLog)
		r.waitErr = cmd.Wait()
		_, _, _ = serialLog.Close(), console.Close(), silent.Close()
		close(r.done)
	}()
	if err := <-started; err != nil {
		return err
	}
	m.run = r
	m.ons++
	if r.qmp, err = m.connect(ctx, r); err != nil {
		_ = cmd.Process.Kill()
		<-r.done
		m.run = nil
		return err
	}
	return nil
}

// connect polls for QEMU's socket, which appears some milliseconds after the
// start, and gives up when QEMU ends.
func (m *Machine) connect(ctx context.Context, r *running) (*QMP, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	path := files{m.cfg.Dir}.qmp()
	for {
		if c, err := net.Dial("unix", path); err == nil {
			q, err := newQMP(ctx, c, m.cfg.OnEvent)
			if err == nil {
				return q, nil
			}
			_ = c.Close()
			// A QEMU that dies while it starts listens for a moment already;
			// its own words say more than the lost connection.
			wait, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			select {
			case <-r.done:
				return nil, fmt.Errorf("QEMU ended at once (%w): %s", r.waitErr, tailOf(files{m.cfg.Dir}.qemu()))
			case <-wait.Done():
				return nil, err
			}
		}
		select {
		case <-tick.C:
		case <-r.done:
			return nil, fmt.Errorf("QEMU ended at once (%w): %s", r.waitErr, tailOf(files{m.cfg.Dir}.qemu()))
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU does not answer: %w", ctx.Err())
		}
	}
}

// On reports whether the machine runs, and since when.
func (m *Machine) On() (since time.Time, on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == nil {
		return time.Time{}, false
	}
	select {
	case <-m.run.done:
		return time.Time{}, false
	default:
		return m.run.since, true
	}
}

// Done returns a channel that is closed when the machine goes off. It is
// closed already when the machine is off.
func (m *Machine) Done() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == nil {
		c := make(chan struct{})
		close(c)
		return c
	}
	return m.run.done
}

// Reset presses the reset button.
func (m *Machine) Reset(ctx context.Context) error {
	m.mu.Lock()
	run := m.run
	m.mu.Unlock()
	if run == nil {
		return fmt.Errorf("machine: reset %s: it is off", m.name)
	}
	_, err := run.qmp.Execute(ctx, "system_reset", nil)
	return err
}

// Press presses a key of the machine's keyboard, by QEMU's name for it ("ret",
// "x").
func (m *Machine) Press(ctx context.Context, key string) error {
	m.mu.Lock()
	run := m.run
	m.mu.Unlock()
	if run == nil {
		return fmt.Errorf("machine: press a key of %s: it is off", m.name)
	}
	args := map[string]any{"keys": []map[string]string{{"type": "qcode", "data": key}}}
	if _, err := run.qmp.Execute(ctx, "send-key", args); err != nil {
		return fmt.Errorf("machine: press key %s of %s: %w", key, m.name, err)
	}
	return nil
}

// PullOut takes a stick, the disk with this number (from 0), out of a machine
// that is on.
func (m *Machine) PullOut(ctx context.Context, disk int) error {
	m.mu.Lock()
	run := m.run
	m.mu.Unlock()
	if run == nil {
		return fmt.Errorf("machine: pull stick out of %s: it is off", m.name)
	}
	if _, err := run.qmp.Execute(ctx, "device_del", map[string]string{"id": stickID(disk)}); err != nil {
		return fmt.Errorf("machine: pull stick out of %s: %w", m.name, err)
	}
	return nil
}

// Cut takes the power away from machine and TPM in one moment, as pulling the
// plug does: neither gets to write anything. It is no error if the machine is
// off already.
func (m *Machine) Cut() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == nil {
		return nil
	}
	// The TPM first, or it would notice that its machine went.
	if m.tpm != nil {
		if err := m.tpm.Close(); err != nil {
			return fmt.Errorf("machine: cut power of %s: %w", m.name, err)
		}
	}
	if err := m.run.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("machine: cut power of %s: %w", m.name, err)
	}
	<-m.run.done
	return m.finish()
}

// PowerOff switches off; what runs on the machine is not asked. It is no error
// if the machine is off already.
func (m *Machine) PowerOff(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == nil {
		return nil
	}
	// `quit` lets QEMU write its capture files out; a QEMU that does not
	// answer is killed.
	_, err := m.run.qmp.Execute(ctx, "quit", nil)
	if err == nil {
		t := time.NewTimer(5 * time.Second)
		defer t.Stop()
		select {
		case <-m.run.done:
			return m.finish()
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if err := m.run.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("machine: power off %s: %w", m.cfg.Name, err)
	}
	<-m.run.done
	return m.finish()
}

// finish forgets a QEMU that has ended; mu is held.
func (m *Machine) finish() error {
	_ = m.run.qmp.Close()
	m.run = nil
	if m.tpm != nil {
		return m.tpm.Close()
	}
	return nil
}

// Close powers off and leaves only files behind.
func (m *Machine) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return m.PowerOff(ctx)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		_ = os.Remove(to)
		return err
	}
	return out.Close()
}

// tailOf returns the end of a log, for an error text.
func tailOf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "no log"
	}
	s := strings.TrimSpace(string(b))
	if len(s) > 600 {
		s = "..." + s[len(s)-600:]
	}
	if s == "" {
		return "it said nothing"
	}
	return s
}
