package scenario

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// clockSlack is how far a machine's clock may be from the centre's: the
// client corrects what is more than a minute off, and emulation is slow.
const clockSlack = 90 * time.Second

var toldLine = regexp.MustCompile(`the clock was .* off; set to the centre's (\S+)`)

// checkClock: an enrolled machine has the centre's time, whatever its battery
// said. The real-time clock is read from outside, so that it is no word of the
// machine's. A clock that was years ahead can only have been corrected by the
// centre, and the console must say so.
func checkClock(ctx context.Context, l *lab.Lab, m *machine.Machine) error {
	now := time.Now()
	got, err := m.Clock(ctx)
	if err != nil {
		return err
	}
	l.Note(m.Name(), "clock", got.Format(time.RFC3339))
	if off := got.Sub(now).Abs(); off > clockSlack {
		return fmt.Errorf("its clock says %s, %v off the centre's", got.Format(time.RFC3339), off)
	}
	line, told := m.Serial().Find(toldLine)
	if l.Spec.Clock.After(now.Add(time.Hour)) && !told {
		return fmt.Errorf("the console never said that the clock was set")
	}
	if told {
		text := toldLine.FindStringSubmatch(line.Text)[1]
		t, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return fmt.Errorf("the console's time %q: %w", text, err)
		}
		if off := line.At.Sub(t).Abs(); off > clockSlack {
			return fmt.Errorf("the console says %q, %v off", line.Text, off)
		}
	}
	return nil
}
