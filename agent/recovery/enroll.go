package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"time"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/fleet"
)

// tpmLook is the pause between two looks for a TPM.
const tpmLook = 2 * time.Second

// ErrNoTPM is returned (wrapped) by Config.Open when the machine has none.
var ErrNoTPM = errors.New("recovery: no TPM 2.0")

// Enroller is the machine's way to a certificate: its TPM and the protocol.
type Enroller interface {
	// Identity asks the TPM who this machine is. It needs no network.
	Identity(ctx context.Context) (Identity, error)
	// Enroll proves the machine and waits for the decision, reporting through
	// Services.Progress. It tries for ever; an error means that it cannot go
	// on at all (the TPM is gone) or that ctx ended.
	Enroll(ctx context.Context) error
	// Stay keeps an enrolled machine in touch with the centre. It ends with
	// ctx, or with an error when the machine has to enroll again.
	Stay(ctx context.Context) error
	Close() error
}

// Identity is who a machine is, for its screen.
type Identity struct {
	Node  fleet.NodeID
	Words string
	EK    fleet.EKHash
}

// Progress is one step of enrollment.
type Progress struct {
	// State is Time, Enrolling, WaitingForApproval or Enrolled; Network and
	// Booting are not an Enroller's to say.
	State agent.State
	// Text is for the screen; it may be the centre's and is made printable.
	Text    string
	Request fleet.RequestID
}

// Services is what recovery lends to an Enroller.
type Services struct {
	Site     fleet.SiteConfig
	Hardware func() fleet.Hardware
	EventLog func() ([]byte, error)
	Now      func() time.Time
	// SetTime sets the clock to what the authenticated centre told; it
	// refuses times before the floor.
	SetTime func(time.Time) error
	// Floor is the earliest time that is believed.
	Floor    time.Time
	Progress func(Progress)
	Dial     func(ctx context.Context, network, addr string) (net.Conn, error)
	// NeedModule loads a kernel module by its name.
	NeedModule func(name string) error
	// Restart ends this start of the machine, with a reason for the screen.
	Restart func(why string)
	// Why says why the machine is in recovery; it may take a moment.
	Why func(context.Context) Started
	Log *slog.Logger
}

// enrollment keeps an Enroller running: it opens the TPM, waits for an
// address, enrolls, and starts over with a growing pause when anything in it
// fails or panics.
type enrollment struct {
	open     func(context.Context, Services) (Enroller, error)
	services Services
	// up returns a channel that is closed while there is an address.
	up func() <-chan struct{}
	// redo yields when the network came back after it was away: waiting out
	// an old backoff then would be wrong.
	redo <-chan struct{}
	// identity and failed report; an empty text clears the failure.
	identity func(Identity)
	failed   func(text string)
	pause    func(context.Context, time.Duration)
	log      *slog.Logger
}

// run returns ctx's error when that ends, and nothing else ends it.
func (e *enrollment) run(ctx context.Context) error {
	wait := agent.Backoff{First: time.Second, Most: 30 * time.Second}
	for {
		err := e.once(ctx, &wait)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrNoTPM) { // a look costs nothing
			e.failed(NoTPM)
			e.log.Debug("no TPM", "err", err)
			e.pause(ctx, tpmLook)
			continue
		}
		e.log.Warn("enrollment stopped", "err", err)
		switch {
		case errors.Is(err, ErrNotANode):
			e.failed(firstLine(err))
		default:
			e.failed("enrollment stopped, starting again: " + firstLine(err))
		}
		e.pause(ctx, wait.Next(rand.Float64()))
	}
}

// errRedo ends an attempt that waits out a backoff from before the outage.
var errRedo = errors.New("recovery: the network is back, trying at once")

// once is one life of an Enroller. A panic in it is its end, not the
// machine's.
func (e *enrollment) once(ctx context.Context, wait *agent.Backoff) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("recovery: enroll: panic: %v\n%s", r, debug.Stack())
		}
	}()
	en, err := e.open(ctx, e.services)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := en.Close(); cerr != nil {
			e.log.Info("close TPM", "err", cerr)
		}
	}()
	id, err := en.Identity(ctx)
	if err != nil {
		return fmt.Errorf("recovery: ask the TPM: %w", err)
	}
	e.identity(id)
	e.failed("")
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-e.up():
		}
		err := e.enroll(ctx, en)
		if errors.Is(err, errRedo) {
			continue
		}
		if err != nil {
			return err
		}
		wait.Reset()
		if err := en.Stay(ctx); err != nil {
			return err
		}
		return errors.New("recovery: the connection habit ended")
	}
}

// enroll runs Enroll until it ends or the network has been away.
func (e *enrollment) enroll(ctx context.Context, en Enroller) error {
	ectx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				ended <- fmt.Errorf("recovery: enroll: panic: %v\n%s", r, debug.Stack())
			}
		}()
		ended <- en.Enroll(ectx)
	}()
	select {
	case err := <-ended:
		return err
	case <-e.redo:
		cancel()
		if err := <-ended; err == nil {
			return nil // it had just been done
		}
		return errRedo
	}
}
