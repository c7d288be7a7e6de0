package recovery

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/efi"
)

// leave lets a machine go that came over the network, that nobody wants and
// that has a system of somebody else on its disk: it starts that. Somebody may
// have plugged it into the wrong port.
func (m *machine) leave(ctx context.Context) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		waiting := make(chan time.Duration, 1)
		m.post(func() {
			d := time.Duration(0)
			// An order is shown as text behind the state.
			if m.state == agent.WaitingForApproval || m.state == agent.Enrolled && (m.cond.Progress == nil || m.cond.Progress.Text == "") {
				d = m.uptime() - m.since
			}
			waiting <- d
		})
		var d time.Duration
		select {
		case <-ctx.Done():
			return ctx.Err()
		case d = <-waiting:
		}
		if d < firmware.LeaveAfter {
			continue // nothing is looked at before
		}
		if err := m.leaveNow(d); err != nil {
			m.log.Info("this machine stays in recovery", "err", err)
		}
	}
}

func (m *machine) leaveNow(waiting time.Duration) error {
	vars, err := efi.OpenVars(efivarsDir)
	if err != nil {
		return err
	}
	b, err := vars.Boot()
	if err != nil {
		return err
	}
	h := facts.Read(os.DirFS("/"))
	next, why, ok := firmware.LeaveRecovery(firmware.IdleFacts{
		Waiting: waiting, Network: h.BootPath == "pxe" || h.BootPath == "http", Entries: b.Entries, Order: b.Order, Ours: ours(),
	})
	if !ok {
		return fmt.Errorf("recovery: leave: %s", why)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_REMOUNT
	if err := unix.Mount("efivarfs", efivarsDir, "efivarfs", flags, ""); err != nil {
		return fmt.Errorf("recovery: leave: %w", err)
	}
	if err := vars.SetNext(next); err != nil {
		return err
	}
	m.post(func() { m.restart = why })
	return nil
}

const efivarsDir = "/sys/firmware/efi/efivars"

// ours says whether the kernel sees partitions with our labels. Only names are
// looked at: no disk is opened.
func ours() bool {
	labels := map[string]bool{}
	parts, _ := filepath.Glob("/sys/class/block/*/partition")
	for _, p := range parts {
		b, err := readCapped(filepath.Join(filepath.Dir(p), "uevent"), 4096)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(b), "\n") {
			if label, ok := strings.CutPrefix(line, "PARTNAME="); ok {
				labels[label] = true
			}
		}
	}
	return labels[firmware.LabelMeta] && labels[firmware.LabelRootA]
}
