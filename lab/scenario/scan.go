package scenario

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// What a machine that scans prints.
var (
	scannedLine = regexp.MustCompile(`muster-node: scanned: (\S+ \S+ \S+ \S+ \S+ \S+) is on the list|muster-node: failed:|` + lab.DeadLine.String())
	lockedLine  = regexp.MustCompile(`muster-node: failed: the stick is write-protected|muster-node: scanned:|` + lab.DeadLine.String())
	offLine     = regexp.MustCompile(`muster-node: switching off:|` + lab.DeadLine.String())
)

// Numbers of the disks of a machine that scans.
const (
	scanStick = iota
	scanInside
)

// prepareScan makes the image that enrolls, as for any scenario, and the one
// that scans.
func prepareScan(ctx context.Context, l *lab.Lab) error {
	if l.Spec.Image != "" || l.Spec.Forged || l.Spec.Nodes != 1 || l.Spec.Boot != machine.BootTFTP {
		return &lab.UsageError{Err: errors.New("scenario: scan has one machine, honest images, and chooses the ways to boot itself")}
	}
	if _, err := exec.LookPath("mcopy"); err != nil {
		return &lab.Unable{Reason: "the list is read from the stick as people do, by the file system", Packages: []string{"mtools"}}
	}
	if err := prepareEnroll(ctx, l); err != nil {
		return err
	}
	l.Say("lab", "image", "building the stick that scans")
	args := []string{"recovery", "--out", l.Path("scan"), "--mode", "scan", "--scan-site", site, "--format", "disk", "--node-binary", l.Spec.NodeProgram}
	return musterImage(ctx, l, "stick that scans", args...)
}

// runScan: a machine in a warehouse is started from a stick, which lists it;
// the list is imported; the machine is then approved when it calls, by nobody.
// A stick that cannot be written says so. Nothing else is ever written.
func runScan(ctx context.Context, l *lab.Lab) error {
	// The time it takes to boot is that of the image that enrolls: the other
	// one has no network to show.
	if err := l.ChooseAccel(ctx, imageFile(l)); err != nil {
		return err
	}
	medium, err := os.ReadFile(l.Path("scan", "recovery.img"))
	if err != nil {
		return fmt.Errorf("scenario: read the stick: %w", err)
	}
	inside, err := diskInside(medium)
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{"stick.img": medium, "locked.img": medium, "inside.img": inside} {
		if err := os.WriteFile(l.Path(name), b, 0o644); err != nil {
			return fmt.Errorf("scenario: make disks: %w", err)
		}
	}
	scanning := func(stick string, locked bool) func(*machine.Config) {
		return func(c *machine.Config) {
			c.Boot = machine.BootDisk
			c.Disks = []machine.Disk{
				scanStick:  {File: l.Path(stick), Bus: machine.BusUSB, Serial: "STICK", Boot: true, ReadOnly: locked},
				scanInside: {File: l.Path("inside.img"), Bus: l.Spec.DiskBus, Serial: "INSIDE"},
			}
		}
	}
	m, err := l.AddMachine(scanning("locked.img", true))
	if err != nil {
		return err
	}
	if err := scanLocked(ctx, l, m); err != nil {
		return err
	}
	if err := m.Rebuild(scanning("stick.img", false)); err != nil {
		return err
	}
	list, err := scanOnce(ctx, l, m, medium)
	if err != nil {
		return err
	}
	if err := l.Check("the other disk in the machine, which calls itself a stick of muster's too, was not written", sameBytes(l.Path("inside.img"), inside)); err != nil {
		return err
	}
	return enrollScanned(ctx, l, m, list)
}

// diskInside is a disk that could be taken for the stick by whoever looks less
// than closely: the same file system, label and program, and a list. Only its
// partition has another name.
func diskInside(medium []byte) ([]byte, error) {
	const sector, guid = 512, 2*512 + 16
	out := bytes.Clone(medium)
	out[guid] ^= 0xff
	// The checksums of the table: of its entries, and of its header with that
	// (UEFI 2.10, section 5.3.2).
	le, header := binary.LittleEndian, out[sector:][:92]
	entries := int(le.Uint32(header[80:]) * le.Uint32(header[84:]))
	if string(header[:8]) != "EFI PART" || entries > 32*sector || le.Uint64(header[72:]) != 2 {
		return nil, errors.New("scenario: the medium has another partition table than the lab knows")
	}
	le.PutUint32(header[88:], crc32.ChecksumIEEE(out[2*sector:][:entries]))
	le.PutUint32(header[16:], 0)
	le.PutUint32(header[16:], crc32.ChecksumIEEE(header))
	return out, nil
}

// scanLocked: a stick whose switch says read-only.
func scanLocked(ctx context.Context, l *lab.Lab, m *machine.Machine) error {
	before, err := os.ReadFile(l.Path("locked.img"))
	if err != nil {
		return err
	}
	inside, err := os.ReadFile(l.Path("inside.img"))
	if err != nil {
		return err
	}
	if err := l.PowerOn(ctx, m); err != nil {
		return err
	}
	line, err := m.Serial().Wait(ctx, 0, lockedLine)
	if err == nil && !strings.Contains(line.Text, "write-protected") {
		err = fmt.Errorf("it says %q", line.Text)
	}
	if err := l.Check("with a write-protected stick: the screen says so and what to do", err); err != nil {
		return err
	}
	if err := m.Cut(); err != nil {
		return err
	}
	return l.Check("with a write-protected stick: neither it nor the other disk was written",
		errors.Join(sameBytes(l.Path("locked.img"), before), sameBytes(l.Path("inside.img"), inside)))
}

// scanOnce: the ordinary case, up to the list.
func scanOnce(ctx context.Context, l *lab.Lab, m *machine.Machine, medium []byte) (enroll.List, error) {
	mark := m.Serial().Mark()
	if err := l.PowerOn(ctx, m); err != nil {
		return enroll.List{}, err
	}
	began := time.Now()
	line, err := m.Serial().Wait(ctx, mark, scannedLine)
	words := ""
	if err == nil {
		if found := scannedLine.FindStringSubmatch(line.Text); found[1] == "" {
			err = fmt.Errorf("it says %q", line.Text)
		} else {
			words = found[1]
			l.Timing(m.Name(), "power_on_to_scanned_s", line.At.Sub(began))
		}
	}
	if err := l.Check("the machine says that it is on the list", err); err != nil {
		return enroll.List{}, err
	}
	// At once, as people do: the words promise that it is safe.
	if err := m.PullOut(ctx, scanStick); err != nil {
		return enroll.List{}, err
	}
	if line, err = m.Serial().Wait(ctx, mark, offLine); err == nil && lab.DeadLine.MatchString(line.Text) {
		err = fmt.Errorf("the machine is stuck: %s", line.Text)
	}
	if err == nil {
		select {
		case <-m.Done():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err := l.Check("the stick is pulled out: the machine stays in order and switches itself off", err); err != nil {
		return enroll.List{}, err
	}
	if err := m.PowerOff(ctx); err != nil {
		return enroll.List{}, err
	}
	csv, err := fromFAT(ctx, l.Path("stick.img"), "machines.csv")
	list := enroll.ParseList(csv)
	switch {
	case err != nil:
	case len(list.Problems) > 0 || len(list.EKs) != 1:
		err = fmt.Errorf("%s: %+v", csv, list)
	case fleet.Words(list.EKs[0].EK.NodeID()) != words || !bytes.Contains(csv, []byte(words)):
		err = fmt.Errorf("the screen said %q, the list %s", words, csv)
	case list.EKs[0].Serial != "LAB-0001" || list.EKs[0].Site != site || !bytes.Contains(csv, []byte(",muster lab,")):
		err = fmt.Errorf("serial, site or model is missing: %s", csv)
	}
	if err == nil {
		l.Say("lab", "list", strings.TrimSpace(string(csv)))
		err = os.WriteFile(l.Path("machines.csv"), csv, 0o644)
	}
	if err := l.Check("the stick has the list: EK, serial, site, model and the words of the screen", err); err != nil {
		return list, err
	}
	had, err := fromFAT(ctx, l.Path("stick.img"), "EFI/BOOT/BOOTX64.EFI")
	if err == nil && !bytes.Contains(medium, had) {
		err = errors.New("the program on it has changed")
	}
	return list, l.Check("the stick still starts machines", err)
}

// enrollScanned: the list is imported, the machine is switched on elsewhere.
func enrollScanned(ctx context.Context, l *lab.Lab, m *machine.Machine, list enroll.List) error {
	c, err := startCentre(ctx, l, true)
	if err != nil {
		return err
	}
	return c.alive(ctx, func(ctx context.Context) error {
		if err := c.introduce(ctx); err != nil {
			return err
		}
		_, err := c.muster(ctx, "preapprove", "import", l.Path("machines.csv"), "--create-sites", "--name", "warehouse")
		if err := l.Check("the list from the stick is imported as it is", err); err != nil {
			return err
		}
		if err := m.Rebuild(func(cfg *machine.Config) { cfg.Boot, cfg.Disks = machine.BootTFTP, nil }); err != nil {
			return err
		}
		mark := m.Serial().Mark()
		if err := l.PowerOn(ctx, m); err != nil {
			return err
		}
		_, err = enrolledSince(ctx, m, mark)
		if err := l.Check("switched on at its site: the machine is enrolled", err); err != nil {
			return err
		}
		r, err := c.waitRequest(ctx, m.UUID(), func(r fleet.Request) bool { return r.State == fleet.RequestIssued })
		if err == nil {
			l.Enrolled(m.Name(), string(r.Node), string(r.ID))
			switch {
			case r.Evidence.EK != list.EKs[0].EK:
				err = fmt.Errorf("request %s is of EK %s", r.ID, r.Evidence.EK)
			case r.Site != site || !strings.Contains(r.DecidedBy, "warehouse"):
				err = fmt.Errorf("request %s for site %q was decided by %q", r.ID, r.Site, r.DecidedBy)
			}
		}
		if err := l.Check("it was approved by the list alone, for its site", err); err != nil {
			return err
		}
		_, err = c.muster(ctx, "audit", "verify")
		return l.Check("the audit log's chain of hashes is whole", err)
	})
}

// fromFAT reads a file from the file system on a medium, with a program that
// is not ours.
func fromFAT(ctx context.Context, medium, name string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "mcopy", "-n", "-i", medium+"@@1M", "::/"+name, "-")
	var out, why bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &why
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("scenario: read %s from %s: %w: %s", name, medium, err, strings.TrimSpace(why.String()))
	}
	return out.Bytes(), nil
}

// sameBytes says what a file holds now and then.
func sameBytes(name string, want []byte) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if sum := sha256.Sum256(want); !bytes.Equal(h.Sum(nil), sum[:]) {
		return fmt.Errorf("%s was written: SHA-256 was %x, is %x", name, sum, h.Sum(nil))
	}
	return nil
}
