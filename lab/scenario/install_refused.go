package scenario

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// refusalLimit is how long a refusal may take to be seen; it is for broken
// runs.
const refusalLimit = 5 * time.Minute

// runInstallRefused: what must not be installed is not, and both the machine's
// screen and the centre say why.
func runInstallRefused(ctx context.Context, l *lab.Lab) error {
	const serial = "TWIN"
	var second string
	e, err := openEstate(ctx, l, estateOptions{disks: func(n int, c *machine.Config) {
		second = l.Path("node1-second.img")
		if err := makeDisk(second, diskSize, nil); err != nil {
			l.Say("lab", "disk", err.Error()) // the machine cannot be made without it
		}
		c.Disks[1].Serial = serial
		c.Disks = append(c.Disks, machine.Disk{File: second, Bus: l.Spec.DiskBus, Serial: serial})
	}})
	if err != nil {
		return err
	}
	p := e.pcs[0]
	err = e.c.alive(ctx, func(ctx context.Context) error {
		requests, err := e.requested(ctx)
		if err != nil {
			return err
		}
		if err := approveOne(ctx, l, e.c, p.Machine, requests[p.Name()]); err != nil {
			return err
		}
		if err := l.Check("two disks that say the same: the site's rule waits for a person, with the reason", e.event(ctx, p, "install.waits", serial)); err != nil {
			return err
		}
		if err := l.Check("a person's order for that serial is refused, with the reason", e.refusedOrder(ctx, p, "serial="+serial)); err != nil {
			return err
		}
		if err := l.Check("nothing was written to any disk", errors.Join(e.blank(), empty(second))); err != nil {
			return err
		}
		// One of the two is taken out. Now the centre orders it; but what the
		// centre holds of the image is altered.
		mend, err := e.alter(ctx, firstVersion)
		if err != nil {
			return err
		}
		if err := e.rebuild(ctx, p, func(c *machine.Config) { c.Disks = c.Disks[:2] }); err != nil {
			return err
		}
		if err := l.Check("with one disk left the order comes; an altered image is not taken, and the machine says so", e.says(ctx, p, `installing .*I wait for the image: .*other bytes than those asked for, so`)); err != nil {
			return err
		}
		if err := l.Check("the centre shows the reason", e.centreSays(ctx, p, "other bytes than those asked for")); err != nil {
			return err
		}
		if err := l.Check("nothing can start from the disk", notStartable(p)); err != nil {
			return err
		}
		// Before it is mended the disk is changed for another one: the order
		// names the first.
		sum, err := diskSum(p.disk)
		if err != nil {
			return err
		}
		if err := e.rebuild(ctx, p, func(c *machine.Config) {
			c.Disks[1] = machine.Disk{File: second, Bus: l.Spec.DiskBus, Serial: "STRANGER"}
		}); err != nil {
			return err
		}
		if err := l.Check("with another disk in its place the machine writes nothing, and says which disks it has", e.says(ctx, p, `waiting.*I write nothing: .*`+serial+`.*STRANGER`)); err != nil {
			return err
		}
		if err := l.Check("the centre shows that, too", e.centreSays(ctx, p, "STRANGER")); err != nil {
			return err
		}
		if err := l.Check("nothing was written to that disk", empty(second)); err != nil {
			return err
		}
		// All is well again: nobody has to do anything more.
		now, err := diskSum(p.disk)
		if err == nil && now != sum {
			err = errors.New("the disk that was taken out has changed")
		}
		if err := errors.Join(err, mend()); err != nil {
			return err
		}
		if err := e.rebuild(ctx, p, func(c *machine.Config) {
			c.Disks[1] = machine.Disk{File: p.disk, Bus: l.Spec.DiskBus, Serial: serial}
		}); err != nil {
			return err
		}
		if err := l.Check("with the right disk and the right image the same order is carried out", e.carriedOut(ctx, p)); err != nil {
			return err
		}
		return l.Check("the disk that nobody named is as it was", p.untouched())
	})
	if err != nil || l.Spec.Keep {
		return err
	}
	return l.Check("the centre ends in order", e.c.stop())
}

// rebuild changes a machine with its power off, and waits until it is at home
// again.
func (e *estate) rebuild(ctx context.Context, p *pc, edit func(*machine.Config)) error {
	if err := e.cut(p); err != nil {
		return err
	}
	if err := p.Rebuild(edit); err != nil {
		return err
	}
	if err := e.on(ctx, p); err != nil {
		return err
	}
	line, err := p.Serial().Wait(ctx, p.from, enrolledLine)
	if err == nil && lab.DeadLine.MatchString(line.Text) {
		err = fmt.Errorf("the machine is stuck: %s", line.Text)
	}
	return err
}

// says waits for a line on the machine's screen.
func (e *estate) says(ctx context.Context, p *pc, pattern string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, refusalLimit, fmt.Errorf("after %s", refusalLimit))
	defer cancel()
	line, err := p.Serial().Wait(ctx, p.from, regexp.MustCompile(`muster-node: restarting|`+pattern))
	switch {
	case err != nil:
		return fmt.Errorf("%w; its screen says: %s", err, p.screen())
	case strings.Contains(line.Text, "restarting"):
		return fmt.Errorf("it restarts: %s", line.Text)
	}
	return nil
}

// centreSays waits until the centre shows a reason at the machine's system.
func (e *estate) centreSays(ctx context.Context, p *pc, text string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, refusalLimit, fmt.Errorf("after %s", refusalLimit))
	defer cancel()
	last := "nothing"
	err := poll(ctx, time.Second, func() (bool, error) {
		v, err := e.describe(ctx, p)
		if err != nil || v.System == nil {
			return false, nil // a busy moment; the context ends it
		}
		last = fmt.Sprintf("%s: %s", v.System.State, v.System.Reason)
		return strings.Contains(v.System.Reason, text), nil
	})
	if err != nil {
		return fmt.Errorf("%w; it shows %s", err, last)
	}
	e.l.Say("centre", "system", last)
	return nil
}

// carriedOut waits until the order is done.
func (e *estate) carriedOut(ctx context.Context, p *pc) error {
	ctx, cancel := context.WithTimeoutCause(ctx, installLimit, fmt.Errorf("after %s", installLimit))
	defer cancel()
	return poll(ctx, time.Second, func() (bool, error) {
		o, err := e.order(ctx, p, fleet.OrderInstall)
		return err == nil && o != nil && o.State == fleet.OrderDone, nil
	})
}

// event waits for an event about a machine.
func (e *estate) event(ctx context.Context, p *pc, kind, text string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, refusalLimit, fmt.Errorf("no event %s about %q after %s", kind, text, refusalLimit))
	defer cancel()
	return poll(ctx, time.Second, func() (bool, error) {
		b, err := e.c.muster(ctx, "events", "--tail", "500", "-o", "json")
		if err != nil {
			return false, nil // a busy moment; the context ends it
		}
		for line := range strings.Lines(string(b)) {
			var x fleet.Event
			if json.Unmarshal([]byte(line), &x) == nil && x.Kind == kind && x.Node == p.node && strings.Contains(x.Text, text) {
				e.l.Say("centre", "event", x.Text)
				return true, nil
			}
		}
		return false, nil
	})
}

// refusedOrder: the centre refuses a person's order and says what to do.
func (e *estate) refusedOrder(ctx context.Context, p *pc, disk string) error {
	_, err := e.c.muster(ctx, "order", "install", string(p.node), "--disk", disk, "--reason", "a person wants it", "--yes")
	var refused *lab.CommandError
	switch {
	case err == nil:
		return errors.New("the order was given")
	case !errors.As(err, &refused):
		return err
	case !strings.Contains(refused.Stderr, "2 disks"):
		return fmt.Errorf("it says %q", refused.Stderr)
	}
	e.l.Say("centre", "refused", refused.Stderr)
	return nil
}

// empty returns an error if anything was ever written to an image.
func empty(name string) error {
	sum, err := diskSum(name)
	if err == nil && sum != hex.EncodeToString(emptySum) {
		err = fmt.Errorf("%s was written to", filepath.Base(name))
	}
	return err
}

// notStartable returns an error if the ESP has anything that starts.
func notStartable(p *pc) error {
	parts, err := firmware.Layout(diskSize, 512)
	if err != nil {
		return err
	}
	for _, dir := range []string{"EFI/Linux", "EFI/BOOT", "EFI/systemd"} {
		out, err := exec.Command("mdir", "-b", "-i", fmt.Sprintf("%s@@%d", p.disk, parts[0].Start), "::/"+dir).CombinedOutput()
		if err == nil && strings.Contains(strings.ToLower(string(out)), ".efi") {
			return fmt.Errorf("the ESP has %s", strings.Join(strings.Fields(string(out)), " "))
		}
	}
	return nil
}

// emptySum is SHA-256 over nothing.
var emptySum, _ = hex.DecodeString("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")

// alter changes one bit of the image's file system where the centre keeps it,
// as a bad disk or somebody with access to it does; mend takes it back.
func (e *estate) alter(_ context.Context, version string) (mend func() error, err error) {
	name, err := e.blobOf(version)
	if err != nil {
		return nil, err
	}
	flip := func() error {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("scenario: alter image: %w", err)
		}
		const at = 6_000_000 // in the second chunk
		b := make([]byte, 1)
		_, err = f.ReadAt(b, at)
		b[0] ^= 1
		if err == nil {
			_, err = f.WriteAt(b, at)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("scenario: alter image: %w", err)
		}
		return nil
	}
	if err := os.Chmod(name, 0o600); err != nil {
		return nil, fmt.Errorf("scenario: alter image: %w", err)
	}
	e.l.Say("lab", "alter", "one bit of the image changes where the centre keeps it")
	return flip, flip()
}

// findBlob finds a file of the centre by its digest.
func findBlob(dir, digest string) (found string, err error) {
	err = filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.Contains(strings.ReplaceAll(p, "/", ""), digest) {
			found = p
		}
		return err
	})
	if err == nil && found == "" {
		err = fmt.Errorf("scenario: no file %s below %s", digest, dir)
	}
	return found, err
}

// slotManifest reads the manifest of a slot image of the run.
func slotManifest(l *lab.Lab, version string) (m firmware.Manifest, err error) {
	b, err := os.ReadFile(filepath.Join(slotDir(l, version), fmt.Sprintf("%s-%s-amd64.manifest", slotImageName, version)))
	if err != nil {
		return m, fmt.Errorf("scenario: read manifest: %w", err)
	}
	env, err := statement.Parse(b)
	if err != nil {
		return m, fmt.Errorf("scenario: read manifest: %w", err)
	}
	return firmware.ParseManifest(env.Payload)
}
