package scenario

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
)

// updateScenarios are about a second system for a machine that has one, and
// about what happens when it does not work.
func updateScenarios() []lab.Scenario {
	return []lab.Scenario{
		{
			Name: "update", Disk: true, Timeout: 45 * time.Minute,
			Summary: "a site gets another stack version: it is written to slot b, tried, found healthy and kept",
			Prepare: prepareUpdate(goodUpdate), Run: runUpdate,
		},
		{
			Name: "update-bad-kernel", Disk: true, Timeout: 60 * time.Minute,
			Summary: "the kernel of a new version panics: the loader goes back by itself, and the node does not try it again",
			Prepare: prepareUpdate(nil), Run: runBadKernel,
		},
		{
			Name: "update-bad-health", Disk: true, Timeout: 45 * time.Minute,
			Summary: "a new version comes up and its k3s does not: the health gate goes back to the one before",
			Prepare: prepareUpdate(sickUpdate), Run: runBadHealth,
		},
		{
			Name: "update-corrupt", Disk: true, Timeout: 60 * time.Minute,
			Summary: "a new version is cut short and then altered at the centre: it is never started, and everybody sees why",
			Prepare: prepareUpdate(goodUpdate), Run: runCorrupt,
		},
		{
			Name: "both-bad", Disk: true, Timeout: 45 * time.Minute,
			Summary: "no system of a machine starts: it ends in the recovery image of its own disk, says why at the centre, and is installed again",
			Prepare: prepareUpdate(nil), Run: runBothBad,
		},
	}
}

const (
	// secondVersion is what machines are updated to, deadVersion the first one
	// with a kernel that finds no initrd.
	secondVersion = "1.1.0"
	deadVersion   = "1.0.1"
)

// updateLimit bounds an update, from the assignment to its end; it is for
// broken runs.
const updateLimit = 25 * time.Minute

// goodUpdate is a version like the first one.
func goodUpdate(*lab.Lab) slotSpec { return slotSpec{version: secondVersion} }

// sickUpdate is one whose k3s ends at once, and that does not take a quarter of
// an hour to be given up.
func sickUpdate(*lab.Lab) slotSpec {
	return slotSpec{version: secondVersion, files: map[string]string{
		"etc/systemd/system/muster-k3s.service.d/99-sick.conf": "[Service]\nExecStartPre=/bin/false\n",
		"etc/systemd/system/muster-agent.service.d/99-sick.conf": "[Service]\nExecStart=\n" +
			"ExecStart=/usr/local/bin/muster-node agent --log text --health-deadline 5m\n",
	}}
}

// prepareUpdate makes what an installation needs, and a second version: spec,
// or the dead one.
func prepareUpdate(spec func(*lab.Lab) slotSpec) func(context.Context, *lab.Lab) error {
	return func(ctx context.Context, l *lab.Lab) error {
		if err := prepareEstate(ctx, l); err != nil {
			return err
		}
		if spec == nil {
			return deadSlot(l, firstVersion, deadVersion)
		}
		return slotImage(ctx, l, spec(l))
	}
}

// offer makes another version the one that the site shall run.
func (e *estate) offer(ctx context.Context, version string) error {
	if err := e.c.publish(ctx, version); err != nil {
		return err
	}
	e.mark()
	return e.c.assign(ctx, version)
}

// mark lets waits begin at this moment of each console.
func (e *estate) mark() {
	for _, p := range e.pcs {
		p.from = p.Serial().Mark()
	}
}

// installedEstate is an estate whose machines run the first version.
func installedEstate(ctx context.Context, l *lab.Lab, then func(context.Context, *estate) error) error {
	e, err := openEstate(ctx, l, estateOptions{})
	if err != nil {
		return err
	}
	err = e.c.alive(ctx, func(ctx context.Context) error {
		if err := e.install(ctx); err != nil {
			return err
		}
		err := e.each(ctx, func(ctx context.Context, p *pc) error { return e.runs(ctx, p, firstVersion, fleet.SystemCurrent) })
		if err := l.Check("the centre sees that every machine runs what it shall", err); err != nil {
			return err
		}
		return then(ctx, e)
	})
	if err != nil || l.Spec.Keep {
		return err
	}
	return l.Check("the centre ends in order", e.c.stop())
}

// becomes waits until the centre hears this of a machine's system. What it says
// on the way is on the time line.
func (e *estate) becomes(ctx context.Context, p *pc, what string, fits func(fleet.SystemReport) bool) (r fleet.SystemReport, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, updateLimit, fmt.Errorf("%s was not %s after %s", p.Name(), what, updateLimit))
	defer cancel()
	said := ""
	err = poll(ctx, time.Second, func() (bool, error) {
		v, err := e.describe(ctx, p)
		if err != nil || v.System == nil {
			return false, nil // a busy moment; the context ends it
		}
		r = *v.System
		if text := fmt.Sprintf("%s: %s %s: %s", r.Image, r.State, r.Target, r.Reason); text != said {
			said = text
			e.l.Say(p.Name(), "system", text)
		}
		return fits(r), nil
	})
	if err != nil {
		err = fmt.Errorf("%w: it runs %s in slot %q and is %s: %s", err, r.Image, r.Slot, r.State, r.Reason)
	}
	return r, err
}

func running(version string, state fleet.SystemState) func(fleet.SystemReport) bool {
	return func(r fleet.SystemReport) bool { return r.Image == slotImageName+"@"+version && r.State == state }
}

// comesUp waits until this slot is up, whatever else the console shows before.
func (e *estate) comesUp(ctx context.Context, p *pc, want firmware.SlotID) error {
	ctx, cancel := context.WithTimeoutCause(ctx, updateLimit, fmt.Errorf("slot %s was not up after %s", want, updateLimit))
	defer cancel()
	line, err := p.Serial().Wait(ctx, p.from, regexp.MustCompile(`muster: slot is up: \{.*"slot":"`+want.String()+`"`))
	if err != nil {
		return err
	}
	p.from = line.N + 1
	e.l.Say(p.Name(), "slot", "slot "+want.String()+" is up")
	return nil
}

// lines counts those of the console since from that match.
func (p *pc) lines(from int, pattern *regexp.Regexp) int {
	n := 0
	for at := from; ; n++ {
		line, ok := p.Serial().FindSince(at, pattern)
		if !ok {
			return n
		}
		at = line.N + 1
	}
}

var (
	panicLine = regexp.MustCompile(`Kernel panic - not syncing`)
	startLine = regexp.MustCompile(`slot initrd started|` + lab.InitLine.String() + `|` + panicLine.String())
)

// bootFiles are the names on the machine's ESP, with its power off.
func (p *pc) bootFiles() ([]string, error) {
	parts, err := firmware.Layout(diskSize, 512)
	if err != nil {
		return nil, err
	}
	out, err := exec.Command("mdir", "-b", "-i", fmt.Sprintf("%s@@%d", p.disk, parts[0].Start), "::/EFI/Linux").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("scenario: read the ESP: %w: %s", err, out)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name := strings.TrimSpace(line); name != "" {
			names = append(names, name[strings.LastIndexByte(name, '/')+1:])
		}
	}
	slices.Sort(names)
	return names, nil
}

// holds compares the names on the ESP, but for the recovery image's.
func (p *pc) holds(want ...string) error {
	got, err := p.bootFiles()
	if err != nil {
		return err
	}
	recovery := slices.ContainsFunc(got, firmware.IsRecovery)
	got = slices.DeleteFunc(got, firmware.IsRecovery)
	if !recovery || !slices.Equal(got, want) {
		return fmt.Errorf("%s: the ESP holds %q (recovery image: %v), want %q and the recovery image", p.Name(), got, recovery, want)
	}
	return nil
}

// failed returns nil if the report remembers the image of this version.
func (e *estate) failed(r fleet.SystemReport, version string) error {
	m, err := slotManifest(e.l, version)
	if err != nil {
		return err
	}
	for _, f := range r.Failed {
		if hex.EncodeToString(f.SHA256) == m.SHA256.String() && f.Reason != "" {
			e.l.Say("centre", "failed", fmt.Sprintf("%s is remembered as failed: %s", f.Image, f.Reason))
			return nil
		}
	}
	return fmt.Errorf("image %s of version %s is not among the failed ones: %+v", m.SHA256, version, r.Failed)
}

// runUpdate: another version, written, tried, blessed.
func runUpdate(ctx context.Context, l *lab.Lab) error {
	return installedEstate(ctx, l, func(ctx context.Context, e *estate) error {
		began := time.Now()
		if err := e.offer(ctx, secondVersion); err != nil {
			return err
		}
		err := e.each(ctx, func(ctx context.Context, p *pc) error { return e.comesUp(ctx, p, firmware.SlotB) })
		if err := l.Check("every machine writes the version to slot b and starts it", err); err != nil {
			return err
		}
		err = e.each(ctx, func(ctx context.Context, p *pc) error {
			_, err := e.becomes(ctx, p, "healthy", running(secondVersion, fleet.SystemCurrent))
			return err
		})
		if err := l.Check("the health gate keeps it, and the centre sees that every machine runs it", err); err != nil {
			return err
		}
		l.Timing("", "assign_to_current_s", time.Since(began))
		err = e.serving(ctx, "site", func(s siteView) error { return s.servers(serversOf(len(e.pcs))) })
		if err := l.Check("the cluster is whole", err); err != nil {
			return err
		}
		err = e.each(ctx, func(_ context.Context, p *pc) error {
			return errors.Join(e.cut(p), p.holds(slotImageName+"-"+firstVersion+".efi", slotImageName+"-"+secondVersion+".efi"))
		})
		return l.Check("off: both boot files are there, without counters, and the recovery image", err)
	})
}

// runBadHealth: a version that comes up and does not work.
func runBadHealth(ctx context.Context, l *lab.Lab) error {
	return installedEstate(ctx, l, func(ctx context.Context, e *estate) error {
		began := time.Now()
		if err := e.offer(ctx, secondVersion); err != nil {
			return err
		}
		err := e.each(ctx, func(ctx context.Context, p *pc) error { return e.comesUp(ctx, p, firmware.SlotB) })
		if err := l.Check("every machine starts the new version", err); err != nil {
			return err
		}
		err = e.each(ctx, func(ctx context.Context, p *pc) error { return e.comesUp(ctx, p, firmware.SlotA) })
		if err := l.Check("its k3s does not stay up: the health gate goes back to the version before", err); err != nil {
			return err
		}
		return e.backOn(ctx, secondVersion, began)
	})
}

// runBadKernel: a version whose kernel never reaches userspace.
func runBadKernel(ctx context.Context, l *lab.Lab) error {
	return installedEstate(ctx, l, func(ctx context.Context, e *estate) error {
		began := time.Now()
		if err := e.offer(ctx, deadVersion); err != nil {
			return err
		}
		err := e.each(ctx, func(ctx context.Context, p *pc) error {
			from := p.from
			if err := e.comesUp(ctx, p, firmware.SlotA); err != nil {
				return err
			}
			if n := p.lines(from, panicLine); n != firmware.Tries {
				return fmt.Errorf("the kernel panicked %d times, want %d", n, firmware.Tries)
			}
			return nil
		})
		if err := l.Check("its kernel panics at each try; then the loader starts the version before, without anybody's help", err); err != nil {
			return err
		}
		return e.backOn(ctx, deadVersion, began)
	})
}

// backOn: the first version runs again, the other one is remembered, at the
// node and at the centre, and its boot file is the last choice.
func (e *estate) backOn(ctx context.Context, failed string, began time.Time) error {
	err := e.each(ctx, func(ctx context.Context, p *pc) error {
		r, err := e.becomes(ctx, p, "rolled back", running(firstVersion, fleet.SystemRolledBack))
		if err != nil {
			return err
		}
		if r.Slot != fleet.SlotA {
			return fmt.Errorf("it runs in slot %q", r.Slot)
		}
		return e.failed(r, failed)
	})
	if err := e.l.Check("the centre sees that it was rolled back, why, and which image failed", err); err != nil {
		return err
	}
	e.l.Timing("", "assign_to_rolled_back_s", time.Since(began))
	err = e.each(ctx, func(ctx context.Context, p *pc) error { return e.event(ctx, p, "system.rolled-back", "") })
	if err := e.l.Check("there is an alarm about it", err); err != nil {
		return err
	}
	err = e.serving(ctx, "site", func(s siteView) error { return s.servers(serversOf(len(e.pcs))) })
	if err := e.l.Check("the cluster is whole", err); err != nil {
		return err
	}
	err = e.each(ctx, func(_ context.Context, p *pc) error {
		if err := e.cut(p); err != nil {
			return err
		}
		names, err := p.bootFiles()
		if err != nil {
			return err
		}
		if !slices.Contains(names, slotImageName+"-"+firstVersion+".efi") || !slices.ContainsFunc(names, func(n string) bool {
			return strings.HasPrefix(n, slotImageName+"-"+failed+"+0")
		}) {
			return fmt.Errorf("the ESP holds %q", names)
		}
		return nil
	})
	return e.l.Check("off: the failed version has no tries left, the one before no counter", err)
}

// runCorrupt: what the centre has is not what was signed.
func runCorrupt(ctx context.Context, l *lab.Lab) error {
	return installedEstate(ctx, l, func(ctx context.Context, e *estate) error {
		if err := e.c.publish(ctx, secondVersion); err != nil {
			return err
		}
		whole, err := e.shorten(secondVersion)
		if err != nil {
			return err
		}
		e.mark()
		from := map[string]int{}
		for _, p := range e.pcs {
			from[p.Name()] = p.from
		}
		if err := e.c.assign(ctx, secondVersion); err != nil {
			return err
		}
		waits := func(pattern string) func(context.Context, *pc) error {
			why := regexp.MustCompile(pattern)
			return func(ctx context.Context, p *pc) error {
				_, err := e.becomes(ctx, p, "waiting", func(r fleet.SystemReport) bool {
					return running(firstVersion, fleet.SystemWriting)(r) && why.MatchString(r.Reason)
				})
				return err
			}
		}
		if err := l.Check("the image is cut short at the centre: the machine waits and says why", e.each(ctx, waits(`I wait for the image: centre: `))); err != nil {
			return err
		}
		if err := whole(); err != nil {
			return err
		}
		mend, err := e.alter(ctx, secondVersion)
		if err != nil {
			return err
		}
		if err := l.Check("one bit of it is altered: the machine waits and says why", e.each(ctx, waits(`I wait for the image: centre:? (it )?sent other bytes`))); err != nil {
			return err
		}
		err = e.each(ctx, func(_ context.Context, p *pc) error {
			if n := p.lines(from[p.Name()], startLine); n != 0 {
				return fmt.Errorf("%s started %d times", p.Name(), n)
			}
			return nil
		})
		if err := l.Check("nothing of it was started", err); err != nil {
			return err
		}
		if err := mend(); err != nil {
			return err
		}
		l.Say("lab", "mend", "the image is mended; who sent wrong bytes is asked again after ten minutes")
		err = e.each(ctx, func(ctx context.Context, p *pc) error {
			if err := e.comesUp(ctx, p, firmware.SlotB); err != nil {
				return err
			}
			_, err := e.becomes(ctx, p, "healthy", running(secondVersion, fleet.SystemCurrent))
			return err
		})
		return l.Check("mended, the same update goes on and is kept", err)
	})
}

// shorten cuts the end off the image's file system where the centre keeps it;
// whole takes that back.
func (e *estate) shorten(version string) (whole func() error, err error) {
	name, err := e.blobOf(version)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("scenario: shorten image: %w", err)
	}
	if err := errors.Join(os.Chmod(name, 0o600), os.Truncate(name, int64(len(b)/2))); err != nil {
		return nil, fmt.Errorf("scenario: shorten image: %w", err)
	}
	e.l.Say("lab", "shorten", "half of the image is gone where the centre keeps it")
	return func() error { return os.WriteFile(name, b, 0o600) }, nil
}

// blobOf is where the centre keeps the file system of a slot image.
func (e *estate) blobOf(version string) (string, error) {
	m, err := slotManifest(e.l, version)
	if err != nil {
		return "", err
	}
	return findBlob(filepath.Join(centreDir(e.l), "blobs"), m.Slot.Root.SHA256.String())
}

// runBothBad: no system starts, and nobody is there.
func runBothBad(ctx context.Context, l *lab.Lab) error {
	e, err := openEstate(ctx, l, estateOptions{unassigned: true})
	if err != nil {
		return err
	}
	p := e.pcs[0]
	err = e.c.alive(ctx, func(ctx context.Context) error {
		if err := e.offer(ctx, deadVersion); err != nil {
			return err
		}
		requests, err := e.requested(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := approveOne(ctx, l, e.c, p.Machine, requests[p.Name()]); err != nil {
			return err
		}
		if err := l.Check("the machine is installed with a system that does not start", e.installed(ctx, p, began)); err != nil {
			return err
		}
		e.mark()
		from := p.from
		if err := l.Check("after all tries the machine starts the recovery image of its own disk", e.recovers(ctx, p, from)); err != nil {
			return err
		}
		r, err := e.becomes(ctx, p, "in recovery", func(r fleet.SystemReport) bool {
			return r.State == fleet.SystemRecovery && strings.Contains(r.Reason, "No system of this disk starts: slot a with "+slotImageName+" "+deadVersion+" used up its 3 tries")
		})
		if err == nil && r.Slot != fleet.SlotRecovery {
			err = fmt.Errorf("it runs in slot %q", r.Slot)
		}
		if err := l.Check("it calls home without anybody's help, and the centre shows why it is there", err); err != nil {
			return err
		}
		l.Timing("", "approve_to_recovery_s", time.Since(began))
		list, err := e.c.requests(ctx)
		if err == nil && len(list) != 1 {
			err = fmt.Errorf("there are %d requests", len(list))
		}
		if err == nil && list[0].Evidence.Boot != fleet.BootMeasured {
			err = fmt.Errorf("its boot is %v", list[0].Evidence.Boot)
		}
		if err := l.Check("its evidence is what was approved: measured, though a loader started it", err); err != nil {
			return err
		}
		if err := e.c.assign(ctx, firstVersion); err != nil {
			return err
		}
		e.mark()
		began = time.Now()
		if _, err := e.c.muster(ctx, "order", "install", string(p.node), "--disk", "serial=DISK1", "--overwrite", "--keep-data", "--reason", "its system does not start", "--yes"); err != nil {
			return fmt.Errorf("scenario: order install: %w", err)
		}
		if err := l.Check("a person orders an installation, and it is carried out from there", e.installed(ctx, p, began)); err != nil {
			return err
		}
		if err := l.Check("the new system starts", e.comesUp(ctx, p, firmware.SlotA)); err != nil {
			return err
		}
		err = e.serving(ctx, "first-server", func(s siteView) error { return s.servers(1) })
		if err := l.Check("the machine is the site's first server", err); err != nil {
			return err
		}
		return l.Check("the disk that nobody named is as it was", p.untouched())
	})
	if err != nil || l.Spec.Keep {
		return err
	}
	return l.Check("the centre ends in order", e.c.stop())
}

// recovers waits until the recovery image runs, started from the disk.
func (e *estate) recovers(ctx context.Context, p *pc, from int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, updateLimit, fmt.Errorf("no recovery image after %s", updateLimit))
	defer cancel()
	line, err := p.Serial().Wait(ctx, from, recoveryLine)
	if err != nil {
		return err
	}
	e.l.Say(p.Name(), "recovery", "the recovery image runs")
	if n := p.lines(from, panicLine); n != firmware.Tries {
		return fmt.Errorf("the kernel panicked %d times, want %d", n, firmware.Tries)
	}
	if line, got := p.Serial().FindSince(from, firmwareLoads); got {
		return fmt.Errorf("it came over the network: %s", line.Text)
	}
	line, err = p.Serial().Wait(ctx, line.N, regexp.MustCompile(`muster-node: note: No system of this disk starts`))
	if err != nil {
		return fmt.Errorf("its screen does not say why: %w", err)
	}
	e.l.Say(p.Name(), "screen", line.Text)
	return nil
}
