package stick

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/sleep"
)

// Times between two looks.
const (
	lookEvery = 2 * time.Second
	// stickGrace is how long a stick may take to be found again by the kernel
	// before its absence is called a failure: hubs are slow.
	stickGrace = 15 * time.Second
	// goodbye is how long the screen says that the stick is out.
	goodbye = 3 * time.Second
)

// Config of Run. All fields are needed.
type Config struct {
	// Entry is what the list shall say of this machine.
	Entry Entry
	// Words is how people call it.
	Words string
	// Partition is the name (PARTUUID) of the partition that the firmware
	// started the image from; "" while or if that is not known.
	Partition func() string
	// Say shows how it stands: agent.Scanning, Scanned or Failed.
	Say func(agent.State, string)
}

// places is what Run does to the machine; tests replace it.
type places struct {
	finder finder
	mount  func(device string, write bool, f func(dir string) error) error
	forget func(disk string) error
	pause  func(context.Context, time.Duration) error
	since  func() time.Duration
}

func realPlaces() places {
	began := time.Now()
	return places{
		finder: finder{os.DirFS("/"), openDisk}, mount: kernelMount, forget: forget, pause: sleep.For,
		since: func() time.Duration { return time.Since(began) },
	}
}

// Run adds the machine to the list on the medium it was started from, trying
// for ever, and returns nil when that medium was taken out afterwards; or ctx's
// error.
func Run(ctx context.Context, cfg Config) error { return run(ctx, cfg, realPlaces()) }

func run(ctx context.Context, cfg Config, p places) error {
	cfg.Say(agent.Scanning, "looking for the stick")
	for ctx.Err() == nil {
		m, err := p.finder.find(cfg.Partition())
		var o outcome
		if err == nil {
			cfg.Say(agent.Scanning, "writing to the stick ("+m.model+"): leave it in")
			o, err = add(m, cfg.Entry, p)
		}
		switch {
		case err == nil:
			cfg.Say(agent.Scanned, o.text(cfg.Words))
			return untilOut(ctx, m, cfg, p)
		case errors.Is(err, ErrGone) && p.since() < stickGrace:
			// The kernel is still looking.
		default:
			cfg.Say(agent.Failed, err.Error())
		}
		if err := p.pause(ctx, lookEvery); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// untilOut waits until nobody can take the stick for still needed.
func untilOut(ctx context.Context, m medium, cfg Config, p places) error {
	for p.finder.present(m.disk) {
		if err := p.pause(ctx, time.Second); err != nil {
			return err
		}
	}
	cfg.Say(agent.Scanned, cfg.Words+" is on the list; the stick is out, this machine switches itself off")
	return p.pause(ctx, goodbye)
}

// add does the whole of it once.
func add(m medium, e Entry, p places) (o outcome, err error) {
	var old, added []byte
	err = p.mount(m.device, false, func(dir string) error {
		if err := recognise(dir, m.guid); err != nil {
			return err
		}
		o, old, added, err = plan(dir, e)
		return err
	})
	if err != nil || o.known {
		return o, err
	}
	if m.protected {
		return o, ErrProtected
	}
	if err := p.mount(m.device, true, func(dir string) error { return appendList(dir, o.file, old, added) }); err != nil {
		return o, err
	}
	if err := p.forget(m.disk); err != nil {
		return o, err
	}
	return o, p.mount(m.device, false, func(dir string) error { return check(dir, o.file, old, added) })
}

// text is what the screen says.
func (o outcome) text(words string) string {
	s := fmt.Sprintf("%s is on the list (%s, machine %d): pull the stick out", words, o.file, o.machines)
	if o.known {
		s = fmt.Sprintf("%s was on the list already (%s): pull the stick out", words, o.file)
	}
	if o.spoiled != "" {
		s += "; " + o.spoiled + " cannot be read as a list and was left alone"
	}
	if o.dropped != "" {
		s += "; its serial number is left out: " + o.dropped
	}
	return s
}

// EntryOf makes the entry from what the machine says of itself.
func EntryOf(ek fleet.EKHash, site string, h fleet.Hardware) Entry {
	model := h.Product
	if h.Vendor != "" {
		model = h.Vendor + " " + model
	}
	return Entry{ListedEK: fleet.ListedEK{EK: ek, Serial: h.Serial, Site: site}, Model: model}
}
