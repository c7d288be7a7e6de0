package scenario

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// site is where the scenario sends its nodes.
const site = "lab"

// What a machine prints, and when its boot cannot go on.
var (
	waitingLine  = regexp.MustCompile(`muster-node: waiting-for-approval:|` + lab.DeadLine.String())
	enrolledLine = regexp.MustCompile(`muster-node: enrolled:|` + lab.DeadLine.String())
	refusedLine  = regexp.MustCompile(`Access Denied|Security Violation`)
	enrolledOnly = regexp.MustCompile(`muster-node: enrolled:`)
)

// runEnroll: from power-on over the approval queue to a certificate for a key
// that never leaves the TPM; or, with a forged image, to nothing.
func runEnroll(ctx context.Context, l *lab.Lab) error {
	c, machines, err := powerOn(ctx, l)
	if err != nil {
		return err
	}
	var requests []fleet.Request
	if l.Spec.Centre == lab.CentreImpostor {
		if err := refuseImpostor(ctx, l, c, machines); err != nil {
			return err
		}
	}
	err = c.alive(ctx, func(ctx context.Context) error {
		switch {
		case l.Spec.VLAN != l.Spec.SwitchVLAN:
			err = wrongVLAN(ctx, l, c, machines)
		case l.Spec.Forged && l.Spec.SecureBoot:
			err = refusedByFirmware(ctx, l, c, machines)
		case l.Spec.Forged:
			err = refusedByCentre(ctx, l, c, machines)
		default:
			err = approved(ctx, l, c, machines)
		}
		if err != nil {
			return err
		}
		requests, err = lastLook(ctx, l, c, machines)
		return err
	})
	if err != nil {
		return err
	}
	if l.Spec.Keep {
		l.Say("lab", "keep", "the checks of what the centre has on its disk are left out, since it goes on")
		return nil
	}
	return aftermath(ctx, l, c, machines, requests)
}

// runUp is the scenario that stays.
func runUp(ctx context.Context, l *lab.Lab) error {
	_, machines, err := powerOn(ctx, l)
	if err != nil {
		return err
	}
	l.Say("lab", "up", fmt.Sprintf("%d machine(s) are booting; they wait for approval in a minute or so", len(machines)))
	l.Ready(ctx)
	return nil
}

// powerOn starts centre, boot host and machines.
func powerOn(ctx context.Context, l *lab.Lab) (*centre, []*machine.Machine, error) {
	if err := l.ChooseAccel(ctx, imageFile(l)); err != nil {
		return nil, nil, err
	}
	dir, err := served(l)
	if err != nil {
		return nil, nil, err
	}
	// Made before the centre starts, so that the TPMs' vendor exists.
	machines, err := addMachines(l, dir+"/recovery.efi")
	if err != nil {
		return nil, nil, err
	}
	if err := startForeign(l); err != nil {
		return nil, nil, err
	}
	// A forged image does not come from our boot host: somebody else on the
	// LAN serves it. Ours stays off.
	// While impostors come and go, a boot host of its own goes on.
	ours := !l.Spec.Forged && l.Spec.Centre != lab.CentreImpostor
	c, err := startCentre(ctx, l, ours)
	if err != nil {
		return nil, nil, err
	}
	if l.Spec.Forged {
		l.Say("lab", "forged", "somebody else on this network serves an altered image")
		if _, err := startBootHost(ctx, l, dir, "foreign boot host"); err != nil {
			return nil, nil, err
		}
	}
	if err := c.introduce(ctx); err != nil {
		return nil, nil, err
	}
	if l.Spec.Boot == machine.BootHTTPS {
		if err := enrolHTTPSRoot(l); err != nil {
			return nil, nil, err
		}
	}
	if l.Spec.DHCP == lab.DHCPProxy && ours && l.Spec.Boot != machine.BootDisk {
		// Beside another DHCP server unknown machines are served only while
		// an operator wants it.
		if err := c.openWindow(ctx, len(machines)); err != nil {
			return nil, nil, err
		}
	}
	if l.Spec.Centre == lab.CentreImpostor {
		// The impostor needs the address before any machine is on.
		return c, machines, nil
	}
	for _, m := range machines {
		if err := l.PowerOn(ctx, m); err != nil {
			return nil, nil, err
		}
	}
	return c, machines, nil
}

// approved: each machine waits in the queue, gets nothing before a person
// approves it, and then its certificate.
func approved(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	requests, err := arrive(ctx, l, c, machines)
	if err != nil {
		return err
	}
	if l.Spec.Boot == machine.BootHTTPS {
		if err := l.Check("the firmware fetched the image by TLS", byHTTPS(machines)); err != nil {
			return err
		}
	}
	if err := judged(l, requests); err != nil {
		return err
	}
	if err := nothingGranted(ctx, l, c, machines, "before approval"); err != nil {
		return err
	}
	if err := checkSecrets(l, machines, "before approval"); err != nil {
		return err
	}

	if l.Spec.Centre == lab.CentreOutage {
		if err := outage(ctx, l, c, machines, requests); err != nil {
			return err
		}
	}
	if l.Spec.PowerCycle {
		err = approveWhileOff(ctx, l, c, machines, requests)
	} else {
		err = approveWhileWaiting(ctx, l, c, machines, requests)
	}
	if err != nil {
		return err
	}
	err = forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		r, err := c.waitRequest(ctx, m.UUID(), func(r fleet.Request) bool { return r.State == fleet.RequestIssued })
		if err == nil && r.ID != requests[m.Name()].ID {
			err = fmt.Errorf("request %s was issued, %s was approved", r.ID, requests[m.Name()].ID)
		}
		return err
	})
	if err := l.Check("after approval: every request is issued", err); err != nil {
		return err
	}
	if l.Spec.PowerCycle {
		if err := resetIssued(ctx, l, c, machines, requests); err != nil {
			return err
		}
	}
	if err := l.Check("the audit log: each request filed once, approved once and by a person", checkAudit(ctx, c, requests)); err != nil {
		return err
	}
	if l.Spec.VLAN != 0 {
		if err := l.Check("every frame of the machine's system had the tag of its VLAN", taggedOnly(l, machines)); err != nil {
			return err
		}
	}
	return l.Check("every machine's clock is the centre's", forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		return checkClock(ctx, l, m)
	}))
}

// judged: the centre says of every request what the TPM proved.
func judged(l *lab.Lab, requests map[string]fleet.Request) error {
	wantBoot := fleet.BootMeasured
	if l.Spec.SecureBoot {
		wantBoot = fleet.BootEnforced
	}
	return l.Check("before approval: pending, identity lab, boot "+wantBoot.String(), each(requests, func(r fleet.Request) error {
		if r.State != fleet.RequestPending || r.Identity != fleet.IdentityLab || r.Boot != wantBoot {
			return fmt.Errorf("request %s is %s, identity %s, boot %s: %s", r.ID, r.State, r.Identity, r.Boot, strings.Join(r.Warnings, "; "))
		}
		return nil
	}))
}

// approveWhileWaiting is the ordinary case.
func approveWhileWaiting(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, requests map[string]fleet.Request) error {
	err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		began := time.Now()
		if err := approveOne(ctx, l, c, m, requests[m.Name()]); err != nil {
			return err
		}
		line, err := enrolledSince(ctx, m, 0)
		if err == nil {
			l.Timing(m.Name(), "approve_to_certificate_s", line.At.Sub(began))
		}
		return err
	})
	return l.Check("after approval: every machine says that it is enrolled", err)
}

// arrive waits until each machine's request is in the queue and its screen
// says so.
func arrive(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) (map[string]fleet.Request, error) {
	requests := map[string]fleet.Request{}
	var mu sync.Mutex
	err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		if err := waitInit(ctx, l, m); err != nil {
			return err
		}
		since, on := m.On()
		if !on {
			return errors.New("it is off")
		}
		line, err := m.Serial().Wait(ctx, 0, waitingLine)
		if err != nil {
			return err
		}
		if lab.DeadLine.MatchString(line.Text) {
			return fmt.Errorf("the machine is stuck: %s", line.Text)
		}
		r, err := c.waitRequest(ctx, m.UUID(), func(fleet.Request) bool { return true })
		if err != nil {
			return err
		}
		// Centre and lab share one clock.
		l.Timing(m.Name(), "power_on_to_request_s", r.FirstSeen.Sub(since))
		l.Enrolled(m.Name(), string(r.Node), string(r.ID))
		l.Say(m.Name(), "request", fmt.Sprintf("request %s (%s) is in the queue: identity %s, boot %s", r.ID, r.Words, r.Identity, r.Boot))
		mu.Lock()
		defer mu.Unlock()
		for name, other := range requests {
			if other.Node == r.Node || other.ID == r.ID {
				return fmt.Errorf("request %s of node %s is %s's, too", r.ID, r.Node, name)
			}
		}
		requests[m.Name()] = r
		return nil
	})
	return requests, l.Check("every machine waits in the approval queue", err)
}

func each(requests map[string]fleet.Request, f func(fleet.Request) error) error {
	var errs []error
	for name, r := range requests {
		if err := f(r); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// nothingGranted: the centre has issued nothing and no machine says that it
// has anything.
func nothingGranted(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, when string) error {
	err := func() error {
		nodes, err := c.nodes(ctx)
		if err != nil {
			return err
		}
		for _, n := range nodes {
			return fmt.Errorf("the centre has node %s with certificate %q", n.ID, n.Certificate.Serial)
		}
		for _, m := range machines {
			if line, ok := m.Serial().Find(enrolledOnly); ok {
				return fmt.Errorf("%s says %q", m.Name(), line.Text)
			}
		}
		return nil
	}()
	return l.Check(when+": no node, no certificate", err)
}

// refusedByCentre: without Secure Boot an altered image runs, and shows.
func refusedByCentre(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	requests, err := arrive(ctx, l, c, machines)
	if err != nil {
		return err
	}
	if err := l.Check("the altered image shows: boot unknown", each(requests, func(r fleet.Request) error {
		if r.State != fleet.RequestPending || r.Boot != fleet.BootUnknown {
			return fmt.Errorf("request %s is %s, boot %s", r.ID, r.State, r.Boot)
		}
		return nil
	})); err != nil {
		return err
	}
	if err := l.Check("the centre refuses to approve it", each(requests, func(r fleet.Request) error {
		_, err := c.muster(ctx, "approve", string(r.ID), "--site", site)
		var refused *lab.CommandError
		switch {
		case err == nil:
			return fmt.Errorf("request %s was approved", r.ID)
		case !errors.As(err, &refused):
			return err
		}
		l.Say("centre", "refused", refused.Stderr)
		return nil
	})); err != nil {
		return err
	}
	list, err := c.requests(ctx)
	if err == nil {
		for _, r := range list {
			if r.State != fleet.RequestPending {
				err = fmt.Errorf("request %s is %s", r.ID, r.State)
			}
		}
	}
	if err := l.Check("its request is still pending", err); err != nil {
		return err
	}
	return nothingGranted(ctx, l, c, machines, "with an altered image")
}

// refusedByFirmware: with Secure Boot an altered image does not run at all.
func refusedByFirmware(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		line, err := m.Serial().Wait(ctx, 0, regexp.MustCompile(refusedLine.String()+"|"+lab.InitLine.String()))
		if err != nil {
			return err
		}
		if !refusedLine.MatchString(line.Text) {
			return fmt.Errorf("the altered image runs: %s", line.Text)
		}
		// The firmware goes on to its next choice: it has not merely said so.
		if _, err := m.Serial().Wait(ctx, line.N+1, regexp.MustCompile(`>>Start|BdsDxe|Shell`)); err != nil {
			return err
		}
		if line, ran := m.Serial().Find(regexp.MustCompile(lab.InitLine.String() + `|EFI stub`)); ran {
			return fmt.Errorf("the altered image runs: %s", line.Text)
		}
		return nil
	})
	if err := l.Check("the firmware refuses the altered image", err); err != nil {
		return err
	}
	list, err := c.requests(ctx)
	if err == nil && len(list) > 0 {
		err = fmt.Errorf("request %s is in the queue", list[0].ID)
	}
	if err := l.Check("no request reaches the centre", err); err != nil {
		return err
	}
	return nothingGranted(ctx, l, c, machines, "with an altered image")
}

// lastLook is what must hold at the end of every run, while all still runs.
func lastLook(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) ([]fleet.Request, error) {
	_, err := c.muster(ctx, "audit", "verify")
	if err := l.Check("the audit log's chain of hashes is whole", err); err != nil {
		return nil, err
	}
	if l.Spec.SMBIOS == lab.SMBIOSHostile && !(l.Spec.Forged && l.Spec.SecureBoot) {
		if err := checkHostile(ctx, l, c, machines); err != nil {
			return nil, err
		}
	}
	requests, err := c.requests(ctx)
	if err != nil {
		return nil, err
	}
	return requests, checkSecrets(l, machines, "at the end")
}

// aftermath ends machines and centre and looks at what is left.
func aftermath(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, requests []fleet.Request) error {
	// QEMU writes the rest of its captures when it ends.
	for _, m := range machines {
		if err := m.PowerOff(ctx); err != nil {
			return err
		}
	}
	if l.Spec.Centre == lab.CentreImpostor {
		if err := l.Check("the same look at the capture finds the real enrollment", toldAll(machines)); err != nil {
			return err
		}
	}
	if err := checkSecrets(l, machines, "with the machines off"); err != nil {
		return err
	}
	if err := l.Check("the centre ends in order", c.stop()); err != nil {
		return err
	}
	if l.Spec.Forged || l.Spec.VLAN != l.Spec.SwitchVLAN {
		return l.Check("no certificate was ever made", checkNoneIssued(ctx, l, requests))
	}
	return l.Check("every certificate and admission says what it should, for the key that the TPM proved", checkIssued(ctx, l, requests))
}

// checkSecrets searches every captured packet, every log, every file that is
// served and every command line for what must be secret.
func checkSecrets(l *lab.Lab, machines []*machine.Machine, when string) error {
	err := func() error {
		secrets, err := canaries(centreDir(l))
		if err != nil {
			return err
		}
		if len(secrets) < 4 {
			return fmt.Errorf("only %d secrets were found to look for", len(secrets))
		}
		places := []string{imageDir(l), l.Path("centre.log"), l.Path("commands.log"), l.Path("events.jsonl")}
		for _, m := range machines {
			places = append(places, l.Path(m.Name(), "serial.log"))
			places = append(places, m.Captures()...)
		}
		if err := searchCommandLines(secrets); err != nil {
			return err
		}
		// The search itself must be able to find: each capture holds its
		// machine's own address.
		for _, m := range machines {
			for _, f := range m.Captures() {
				if search([]canary{{"its own MAC address", macBytes(m)}}, f) == nil {
					return fmt.Errorf("%s does not even hold the machine's own address: nothing was captured", f)
				}
			}
		}
		return search(secrets, places...)
	}()
	return l.Check("no secret in packets, logs, served files, command lines ("+when+")", err)
}
