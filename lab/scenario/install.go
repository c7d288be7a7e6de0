package scenario

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// diskScenarios are those in which machines get a system on their disk.
func diskScenarios() []lab.Scenario {
	return []lab.Scenario{
		{
			Name: "install", Disk: true, Timeout: 40 * time.Minute,
			Summary: "an empty machine is approved, gets its system onto its disk and is a site's first server; then its power is cut",
			Prepare: prepareEstate, Run: runInstall(false),
		},
		{
			Name: "pxe-first", Disk: true, Timeout: 40 * time.Minute,
			Summary: "install, on a firmware that tries the network first at each start: the boot host is silent, and the disk starts",
			Prepare: prepareEstate, Run: runInstall(true),
		},
		{
			Name: "install-refused", Disk: true, Timeout: 40 * time.Minute,
			Summary: "two disks that say the same, an image that was altered at the centre, another disk than the order's: nothing is written, and everybody sees why",
			Prepare: prepareEstate, Run: runInstallRefused,
		},
		{
			Name: "site", Disk: true, Nodes: 3, Timeout: 75 * time.Minute,
			Summary: "three empty machines become a site with three servers, lose the first of them and take it back",
			Prepare: prepareEstate, Run: runVMSite,
		},
	}
}

// What firmware says when it asks the network, and when it gets something.
var (
	firmwareAsks  = regexp.MustCompile(`>>Start PXE|>>Start HTTP`)
	firmwareLoads = regexp.MustCompile(`NBP filename is|Downloading NBP file`)
)

// serversOf is how many servers a site of so many nodes has.
func serversOf(nodes int) int {
	if nodes < 3 {
		return 1
	}
	return 3
}

// runInstall is the whole way of one machine, from power-on with an empty disk
// to a server, and once more after a power cut.
func runInstall(pxeFirst bool) func(context.Context, *lab.Lab) error {
	return func(ctx context.Context, l *lab.Lab) error {
		e, err := openEstate(ctx, l, estateOptions{})
		if err != nil {
			return err
		}
		err = e.c.alive(ctx, func(ctx context.Context) error {
			if err := e.install(ctx); err != nil {
				return err
			}
			err := e.each(ctx, func(ctx context.Context, p *pc) error {
				return errors.Join(e.runs(ctx, p, firstVersion, fleet.SystemCurrent), p.untouched())
			})
			if err := l.Check("the centre sees that every machine runs what it shall; the disk that nobody named is as it was", err); err != nil {
				return err
			}
			if err := e.again(ctx, pxeFirst); err != nil {
				return err
			}
			return e.lastLook(ctx)
		})
		e.report()
		if err != nil || l.Spec.Keep {
			return err
		}
		return e.last(ctx)
	}
}

// again cuts the power: the machines come back from their disks, whatever
// their firmware tries first, and nobody hands out anything.
func (e *estate) again(ctx context.Context, pxeFirst bool) error {
	for _, p := range e.pcs {
		if err := e.cut(p); err != nil {
			return err
		}
		if pxeFirst {
			if err := p.Rebuild(func(c *machine.Config) {
				c.FirmwareOrder = false
				for i := range c.Disks {
					c.Disks[i].Boot = c.Disks[i].File == p.disk
				}
			}); err != nil {
				return err
			}
		}
	}
	off := time.Now()
	for _, p := range e.pcs {
		if err := e.on(ctx, p); err != nil {
			return err
		}
	}
	marks := map[string]int{}
	for _, p := range e.pcs {
		marks[p.Name()] = p.from
	}
	err := e.each(ctx, func(ctx context.Context, p *pc) error {
		if err := e.up(ctx, p, firmware.SlotA); err != nil {
			return err
		}
		if since, on := p.On(); on {
			e.l.Timing(p.Name(), "power_on_to_slot_s", time.Since(since))
		}
		if line, ran := p.Serial().FindSince(marks[p.Name()], recoveryLine); ran {
			return fmt.Errorf("the recovery image ran: %s", line.Text)
		}
		if line, got := p.Serial().FindSince(marks[p.Name()], firmwareLoads); got {
			return fmt.Errorf("the boot host handed something out: %s", line.Text)
		}
		if _, asked := p.Serial().FindSince(marks[p.Name()], firmwareAsks); asked != pxeFirst {
			return fmt.Errorf("the firmware asked the network: %v, want %v", asked, pxeFirst)
		}
		return nil
	})
	name := "after a power cut every machine starts from its disk, and asks the network for nothing"
	if pxeFirst {
		name = "with the network first in the firmware the boot host is silent, and every machine starts from its disk"
	}
	if err := e.l.Check(name, err); err != nil {
		return err
	}
	err = e.serving(ctx, "site", func(s siteView) error {
		for _, n := range s.Nodes {
			if n.Report == nil || !n.Report.At.After(off) {
				return fmt.Errorf("%s has not reported since the power came back", n.Words)
			}
		}
		return s.servers(serversOf(len(e.pcs)))
	})
	return e.l.Check("the cluster is back, and the centre sees it", err)
}

// lastLook is what must hold at the end, while all still runs.
func (e *estate) lastLook(ctx context.Context) (err error) {
	e.requests, err = lastLook(ctx, e.l, e.c, e.machines())
	return err
}

// last are the checks with everything off.
func (e *estate) last(ctx context.Context) error {
	for _, p := range e.pcs {
		if err := p.PowerOff(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, p := range e.pcs {
		errs = append(errs, p.untouched(), p.sealed())
	}
	if err := e.l.Check("off: the data is encrypted and sealed to the TPM, and the disk that nobody named is as it was", errors.Join(errs...)); err != nil {
		return err
	}
	if err := checkSecrets(e.l, e.machines(), "with the machines off"); err != nil {
		return err
	}
	if err := e.l.Check("the centre ends in order", e.c.stop()); err != nil {
		return err
	}
	return e.l.Check("every certificate and admission says what it should, for the key that the TPM proved", checkIssued(ctx, e.l, e.requests))
}
