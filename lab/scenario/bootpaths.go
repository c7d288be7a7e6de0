package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// bootPath is one way by which the same machine comes to run the same image.
type bootPath struct {
	name  string
	boot  machine.Boot
	first []byte // of the program on a disk that the firmware tries first; nil: no such disk
	// sign is what the console must show, so that the way is the one we mean.
	sign *regexp.Regexp
	// foreign: somebody else's program ran before; that must show.
	foreign bool
	// noNVRAM: the firmware has lost its variables before.
	noNVRAM bool
}

// bootPaths in the order in which they are tried. The first one's request is
// what the others are compared with. image is the whole image.
func bootPaths(secureBoot bool, image []byte) []bootPath {
	half := image[:len(image)/2]
	noPE := []byte(strings.Repeat("this is no program\n", 100))
	failed := regexp.MustCompile(`BdsDxe: failed to load Boot`)
	paths := []bootPath{
		{name: "TFTP", boot: machine.BootTFTP, sign: regexp.MustCompile(`NBP file downloaded successfully`)},
		{name: "disk", boot: machine.BootDisk, sign: regexp.MustCompile(`BdsDxe: starting Boot.*"UEFI Misc Device`)},
		{name: "disk, with the firmware's variables lost", boot: machine.BootDisk, sign: regexp.MustCompile(`BdsDxe: starting Boot.*"UEFI Misc Device`), noNVRAM: true},
		{name: "a disk with a damaged program first, then the network", boot: machine.BootTFTP, first: noPE, sign: failed},
		{name: "TFTP again", boot: machine.BootTFTP, sign: regexp.MustCompile(`NBP file downloaded successfully`)},
		{name: "HTTP", boot: machine.BootHTTP, sign: regexp.MustCompile(`URI: http://`)},
		{name: "a disk with half of our image first, then the network", boot: machine.BootTFTP, first: half, sign: failed},
	}
	if !secureBoot { // which would not run it
		paths = append(paths, bootPath{name: "a disk with somebody else's program first, then the network", boot: machine.BootTFTP, first: idleProgram(),
			sign: regexp.MustCompile(`BdsDxe: failed to start Boot`), foreign: true})
	}
	return paths
}

// runBootPaths: one machine, with its TPM and firmware variables, starts the
// same image in several ways in turn. All of them are the same evidence, so
// the request in the queue stays the same one; only a foreign program before
// ours changes it.
func runBootPaths(ctx context.Context, l *lab.Lab) error {
	if l.Spec.Nodes != 1 || l.Spec.Boot != machine.BootTFTP || l.Spec.Forged {
		return &lab.UsageError{Err: errors.New("scenario: boot-paths has one machine, an honest image, and chooses the ways to boot itself")}
	}
	c, machines, err := powerOn(ctx, l)
	if err != nil {
		return err
	}
	m := machines[0]
	var requests []fleet.Request
	err = c.alive(ctx, func(ctx context.Context) error {
		if err := takeBootPaths(ctx, l, c, m); err != nil {
			return err
		}
		requests, err = lastLook(ctx, l, c, machines)
		return err
	})
	if err != nil || l.Spec.Keep {
		return err
	}
	if err := m.PowerOff(ctx); err != nil {
		return err
	}
	if err := l.Check("the centre ends in order", c.stop()); err != nil {
		return err
	}
	return l.Check("no certificate was ever made", checkNoneIssued(ctx, l, requests))
}

func takeBootPaths(ctx context.Context, l *lab.Lab, c *centre, m *machine.Machine) error {
	wantBoot := fleet.BootMeasured
	if l.Spec.SecureBoot {
		wantBoot = fleet.BootEnforced
	}
	image, err := os.ReadFile(imageFile(l))
	if err != nil {
		return fmt.Errorf("scenario: read image: %w", err)
	}
	var first fleet.Request
	for i, p := range bootPaths(l.Spec.SecureBoot, image) {
		mark := 0
		if i > 0 {
			if err := m.Cut(); err != nil {
				return err
			}
			if err := m.Rebuild(func(cfg *machine.Config) { p.rebuild(l, cfg, i) }); err != nil {
				return err
			}
			if p.noNVRAM {
				if err := m.LoseNVRAM(); err != nil {
					return err
				}
			}
			mark = m.Serial().Mark()
			l.Say(m.Name(), "boot-path", "the machine now starts from "+p.name)
			if err := l.PowerOn(ctx, m); err != nil {
				return err
			}
		}
		r, err := p.arrives(ctx, c, m, mark)
		if err == nil {
			l.Say(m.Name(), "request", fmt.Sprintf("request %s: boot %s, PCR 2 %.12s, PCR 7 %.12s", r.ID, r.Boot, r.Evidence.PCRs[2], r.Evidence.PCRs[7]))
		}
		if err := l.Check("from "+p.name+": the machine waits in the approval queue", err); err != nil {
			return err
		}
		if i == 0 {
			first = r
			l.Enrolled(m.Name(), string(r.Node), string(r.ID))
		}
		list, err := c.requests(ctx)
		switch {
		case err != nil:
		case p.foreign && (r.Boot != fleet.BootUnknown || r.ID == first.ID || r.Supersedes != first.ID):
			err = fmt.Errorf("request %s (boot %s, instead of %q) hides the foreign program; the one without was %s", r.ID, r.Boot, r.Supersedes, first.ID)
		case !p.foreign && (r.Boot != wantBoot || r.State != fleet.RequestPending):
			err = fmt.Errorf("request %s is %s, boot %s: %s", r.ID, r.State, r.Boot, strings.Join(r.Warnings, "; "))
		case !p.foreign && (r.ID != first.ID || len(list) != 1):
			err = fmt.Errorf("it is request %s, one of %d; from TFTP it was %s", r.ID, len(list), first.ID)
		}
		what := "the same request, boot " + wantBoot.String()
		if p.foreign {
			what = "another request, boot unknown"
		}
		if err := l.Check("from "+p.name+": "+what, err); err != nil {
			return err
		}
	}
	return nil
}

// rebuild makes the machine start in this way.
func (p bootPath) rebuild(l *lab.Lab, cfg *machine.Config, i int) {
	cfg.Boot, cfg.DiskFirst, cfg.Disks = p.boot, p.first != nil, nil
	folder := l.Path(fmt.Sprintf("stick-%d", i))
	switch {
	case p.first != nil:
		file := filepath.Join(folder, "EFI", "BOOT", "BOOTX64.EFI")
		// What fails here fails at power-on: the folder is missing.
		if os.MkdirAll(filepath.Dir(file), 0o755) == nil {
			_ = os.WriteFile(file, p.first, 0o644)
		}
	case p.boot == machine.BootDisk:
		_ = machine.BootFolder(folder, imageFile(l))
	default:
		return
	}
	cfg.Disks = []machine.Disk{{Folder: folder, Bus: l.Spec.DiskBus, Serial: "STICK", Boot: true}}
}

// arrives waits until the machine has proved itself in this boot, and checks
// that it came the way we mean.
func (p bootPath) arrives(ctx context.Context, c *centre, m *machine.Machine, mark int) (fleet.Request, error) {
	since, on := m.On()
	if !on {
		return fleet.Request{}, errors.New("it is off")
	}
	line, err := m.Serial().Wait(ctx, mark, waitingLine)
	if err != nil {
		return fleet.Request{}, err
	}
	if lab.DeadLine.MatchString(line.Text) {
		return fleet.Request{}, fmt.Errorf("the machine is stuck: %s", line.Text)
	}
	if _, ok := m.Serial().FindSince(mark, p.sign); !ok {
		return fleet.Request{}, fmt.Errorf("the console does not show %q: it came another way", p.sign)
	}
	return c.waitRequest(ctx, m.UUID(), func(r fleet.Request) bool { return r.LastSeen.After(since) })
}
