// Package scenario holds what the lab can run: each scenario starts machines
// and muster's services as a user would and checks what must hold. A scenario
// uses muster's own commands wherever a person would, so that it proves them,
// too.
package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// All returns the scenarios, in the order of `muster lab scenarios`.
func All() []lab.Scenario {
	return append([]lab.Scenario{
		{
			Name:    "boot",
			Summary: "machines boot the recovery image by the firmware's own network stack",
			Prepare: prepareBoot, Run: runBoot,
		},
		{
			Name:    "enroll",
			Summary: "from power-on over the approval queue to a certificate for a key in the TPM",
			Prepare: prepareEnroll, Run: runEnroll,
		},
		{
			Name:    "boot-paths",
			Summary: "one machine by TFTP, disk, HTTP and after a failed boot entry: the same request each time",
			Prepare: prepareEnroll, Run: runBootPaths,
		},
		{
			Name:    "scan",
			Summary: "a stick lists a machine in a warehouse, and the network approves it later without a person",
			Prepare: prepareScan, Run: runScan,
		},
		{
			Name:    "up",
			Summary: "a centre, a boot host and machines that wait for approval, to play with (muster lab up)",
			Prepare: prepareEnroll, Run: runUp,
		},
	}, append(append(diskScenarios(), updateScenarios()...), siteScenarios()...)...)
}

// Find returns a scenario by name.
func Find(name string) (lab.Scenario, bool) {
	for _, s := range All() {
		if s.Name == name {
			return s, true
		}
	}
	return lab.Scenario{}, false
}

// imageDir is where the run's image lies, as `muster image recovery` writes
// it.
func imageDir(l *lab.Lab) string { return l.Path("image") }

// imageFile is the image itself.
func imageFile(l *lab.Lab) string { return filepath.Join(imageDir(l), "recovery.efi") }

// buildImage makes the run's recovery image on the host, where there may be
// an internet to fetch the kernel from.
func buildImage(ctx context.Context, l *lab.Lab, args ...string) error {
	began := time.Now()
	if l.Spec.Image != "" {
		if err := os.MkdirAll(imageDir(l), 0o755); err != nil {
			return fmt.Errorf("scenario: take image: %w", err)
		}
		b, err := os.ReadFile(l.Spec.Image)
		if err != nil {
			return fmt.Errorf("scenario: take image: %w", err)
		}
		if err := os.WriteFile(imageFile(l), b, 0o644); err != nil {
			return fmt.Errorf("scenario: take image: %w", err)
		}
		return nil
	}
	l.Say("lab", "image", "building the recovery image (the first time fetches a kernel)")
	kernel := "cloud"
	if l.Spec.NIC != machine.NICVirtio {
		kernel = "generic" // the cloud kernel has no drivers for real cards
	}
	if l.Spec.VLAN != 0 {
		args = append(args, "--vlan", fmt.Sprint(l.Spec.VLAN))
	}
	args = append([]string{"recovery", "--out", imageDir(l), "--kernel", kernel,
		"--node-binary", l.Spec.NodeProgram}, args...)
	if err := musterImage(ctx, l, "recovery image", args...); err != nil {
		return err
	}
	l.Timing("", "image_build_s", time.Since(began))
	return nil
}

// musterImage runs `muster image` with args, signed where Secure Boot is on.
// what is built is for people.
func musterImage(ctx context.Context, l *lab.Lab, what string, args ...string) error {
	args = append([]string{"image"}, args...)
	if l.Spec.SecureBoot {
		key, err := snakeoilKey(ctx, l)
		if err != nil {
			return err
		}
		args = append(args, "--sign-key", key, "--sign-cert", machine.SnakeoilCert)
	}
	_, err := l.Muster(ctx, args...)
	var refused *lab.CommandError
	if errors.As(err, &refused) && refused.Code == 3 {
		return &lab.Unable{Reason: "the " + what + " cannot be built: " + refused.Stderr}
	}
	if err != nil {
		return fmt.Errorf("scenario: build %s: %w", what, err)
	}
	return nil
}

// addMachines makes the machines of the spec.
func addMachines(l *lab.Lab, image string) ([]*machine.Machine, error) {
	var out []*machine.Machine
	for n := 1; n <= l.Spec.Nodes; n++ {
		folder := l.Path(fmt.Sprintf("stick%d", n))
		if l.Spec.Boot == machine.BootDisk {
			if err := machine.BootFolder(folder, image); err != nil {
				return nil, err
			}
		}
		m, err := l.AddMachine(func(c *machine.Config) {
			if l.Spec.SMBIOS == lab.SMBIOSHostile {
				c.SMBIOS = hostileFirmware()
			}
			if c.Boot == machine.BootHTTPS {
				c.HTTPSRoots = httpsRoots(l)
			}
			if c.Boot == machine.BootDisk {
				c.Disks = []machine.Disk{{Folder: folder, Bus: l.Spec.DiskBus, Serial: fmt.Sprintf("STICK%d", n), Boot: true}}
			}
		})
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

// forEach runs f for each machine at once and returns the first error; the
// others are told to stop by the context.
func forEach(ctx context.Context, machines []*machine.Machine, f func(context.Context, *machine.Machine) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, m := range machines {
		g.Go(func() error {
			if err := f(ctx, m); err != nil {
				return fmt.Errorf("%s: %w", m.Name(), err)
			}
			return nil
		})
	}
	return g.Wait()
}

var initOrDead = regexp.MustCompile(lab.InitLine.String() + "|" + lab.DeadLine.String())

// waitInit waits until the recovery image's /init runs and notes the time
// from power-on.
func waitInit(ctx context.Context, l *lab.Lab, m *machine.Machine) error {
	since, on := m.On()
	if !on {
		return errors.New("it is off")
	}
	line, err := m.Serial().Wait(ctx, 0, initOrDead)
	if err != nil {
		return err
	}
	if !lab.InitLine.MatchString(line.Text) {
		return fmt.Errorf("the machine is stuck: %s", line.Text)
	}
	l.Timing(m.Name(), "power_on_to_init_s", line.At.Sub(since))
	return nil
}

// CentreDir is the centre's data directory below the run's directory.
const CentreDir = "centre"
