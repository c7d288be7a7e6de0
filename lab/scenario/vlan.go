package scenario

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// darkFor is how long a machine on the wrong VLAN is watched: some rounds of
// DHCP.
const darkFor = 40 * time.Second

// taggedOnly: the machine talked in its VLAN, and the port, which drops all
// else, carried it.
func taggedOnly(l *lab.Lab, machines []*machine.Machine) error {
	var errs []error
	for _, m := range machines {
		in, out, dropped := l.TrunkCounts(m)
		l.Say(m.Name(), "vlan", fmt.Sprintf("VLAN %d carried %d frames from the machine and %d to it; %d had no tag and went nowhere", l.Spec.SwitchVLAN, in, out, dropped))
		if in < 20 || out < 20 {
			errs = append(errs, fmt.Errorf("%s: %d frames there, %d back: it came another way", m.Name(), in, out))
		}
	}
	return errors.Join(errs...)
}

// wrongVLAN: the port carries another VLAN than the image knows. The screen
// names what it waits for, and nobody hears of the machine.
func wrongVLAN(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	says := regexp.MustCompile(fmt.Sprintf(`muster-node: network: .*address from DHCP on VLAN %d|muster-node: (time|enrolling|waiting|enrolled)|`, l.Spec.VLAN) + lab.DeadLine.String())
	err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		line, err := m.Serial().Wait(ctx, 0, says)
		if err == nil && !strings.Contains(line.Text, fmt.Sprintf("VLAN %d", l.Spec.VLAN)) {
			err = fmt.Errorf("it says %q", line.Text)
		}
		if err != nil {
			return err
		}
		if err := sleep.For(ctx, darkFor); err != nil {
			return err
		}
		if line, ok := m.Serial().Find(regexp.MustCompile(`muster-node: (time|enrolling|waiting|enrolled)`)); ok {
			return fmt.Errorf("it got through: %q", line.Text)
		}
		in, _, dropped := l.TrunkCounts(m)
		if in != 0 || dropped == 0 {
			return fmt.Errorf("the port carried %d of its frames and dropped %d: this proves nothing", in, dropped)
		}
		return nil
	})
	if err := l.Check("on the wrong VLAN: the screen says which one it waits for, and keeps on", err); err != nil {
		return err
	}
	list, err := c.requests(ctx)
	if err == nil && len(list) > 0 {
		err = fmt.Errorf("request %s is in the queue", list[0].ID)
	}
	if err := l.Check("on the wrong VLAN: no request reaches the centre", err); err != nil {
		return err
	}
	return nothingGranted(ctx, l, c, machines, "on the wrong VLAN")
}
