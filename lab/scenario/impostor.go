package scenario

import (
	"context"
	"errors"
	"fmt"
	"regexp"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// centrePort is where nodes call the centre.
const centrePort = 7444

// aBegin is less than the smallest first message of an enrollment: an RSA-2048
// key alone has 256 bytes, its certificate a thousand. anAlert is more than
// what a client says that hangs up (RFC 8446, 5.2 and 6: 2 bytes, 17 around
// them), and one more for good measure.
const (
	aBegin  = 600
	anAlert = 64
)

var (
	untrustedLine = regexp.MustCompile(`muster-node: .*Somebody else answers at the centre's address`)
	goneLine      = regexp.MustCompile(`muster-node: .*(the centre does not run|The centre does not answer|connection to the centre does not work)`)
)

// refuseImpostor: while another centre, with a CA of its own, answers at the
// address that the image knows, the machines say so and tell it nothing. It
// leaves the real centre running in its place.
func refuseImpostor(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	if err := c.stop(); err != nil {
		return err
	}
	if _, err := startBootHost(ctx, l, imageDir(l), "boot host"); err != nil {
		return err
	}
	impostor := &centre{l: l, name: "impostor", dir: l.Path("impostor"), back: make(chan struct{})}
	if err := impostor.start(ctx); err != nil {
		return err
	}
	l.Say("impostor", "answers", "somebody else answers at "+lab.BootHost+", with a CA of its own")
	err := impostor.alive(ctx, func(ctx context.Context) error {
		for _, m := range machines {
			if err := l.PowerOn(ctx, m); err != nil {
				return err
			}
		}
		err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
			if err := waitInit(ctx, l, m); err != nil {
				return err
			}
			// Twice: it does not give in when asked again.
			line, err := m.Serial().Wait(ctx, 0, untrustedLine)
			if err == nil {
				_, err = m.Serial().Wait(ctx, line.N+1, untrustedLine)
			}
			return err
		})
		if err := l.Check("an impostor at the centre's address: every machine says that somebody else answers", err); err != nil {
			return err
		}
		list, err := impostor.requests(ctx)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("it has request %s", list[0].ID)
		}
		return l.Check("the impostor has no request", err)
	})
	if err != nil {
		return err
	}
	if err := l.Check("the impostor learns nothing: no machine sends more than its TLS hello", toldNothing(machines)); err != nil {
		return err
	}
	if err := impostor.stop(); err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	l.Say("centre", "back", "the real centre has its address back; the machines stay on")
	return nil
}

// toldNothing looks at every captured byte that machines sent to the centre's
// address: a handshake and its end, and no message.
func toldNothing(machines []*machine.Machine) error {
	for _, m := range machines {
		sent, err := sentToCentre(m)
		if err != nil {
			return err
		}
		if len(sent) == 0 {
			return fmt.Errorf("%s did not even call: nothing was tried", m.Name())
		}
		for _, s := range sent {
			if !s.hello {
				return fmt.Errorf("%s: a connection without TLS hello", m.Name())
			}
			if s.data > anAlert {
				return fmt.Errorf("%s sent %d bytes in TLS after its hello", m.Name(), s.data)
			}
		}
	}
	return nil
}

// toldAll is the twin of toldNothing: the same look at the same capture finds
// the enrollment once the real centre is there.
func toldAll(machines []*machine.Machine) error {
	for _, m := range machines {
		sent, err := sentToCentre(m)
		if err != nil {
			return err
		}
		most := 0
		for _, s := range sent {
			most = max(most, s.data)
		}
		if most < aBegin {
			return fmt.Errorf("%s enrolled, and its capture shows %d bytes to the centre at most: what was looked for before cannot be seen", m.Name(), most)
		}
	}
	return nil
}

func sentToCentre(m *machine.Machine) ([]tlsSent, error) {
	var out []tlsSent
	var errs []error
	for _, f := range m.Captures() {
		sent, err := tlsSentTo(f, lab.BootHost, centrePort)
		out = append(out, sent...)
		errs = append(errs, err)
	}
	return out, errors.Join(errs...)
}

// outage kills the centre while machines wait and starts it again.
func outage(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine, requests map[string]fleet.Request) error {
	marks := map[string]int{}
	for _, m := range machines {
		marks[m.Name()] = m.Serial().Mark()
	}
	c.kill()
	err := forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		_, err := m.Serial().Wait(ctx, marks[m.Name()], goneLine)
		return err
	})
	if err := l.Check("the centre is killed: every machine says that the centre is away", err); err != nil {
		return err
	}
	if err := c.start(ctx); err != nil {
		return err
	}
	if err := l.Check("the centre is back: the requests are still there, pending, unchanged", c.are(ctx, requests, fleet.RequestPending)); err != nil {
		return err
	}
	_, err = c.muster(ctx, "audit", "verify")
	return l.Check("the centre is back: its audit log's chain is whole", err)
}
