package slots

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/failpoint"
)

// Record is the record on the meta partition. What Write was given is on the
// disk when it returns; it counts Seq.
type Record interface {
	Read() (firmware.Meta, error)
	Write(m firmware.Meta) error
}

// ESP is the folder EFI/Linux of the EFI system partition. Each change is on
// the disk when the call returns.
type ESP interface {
	// Look lists the folder and says what the loader would start next.
	Look() (View, error)
	Remove(name string) error
	Rename(from, to string) error
	// Stage writes a file of that digest and size and reads it back from the
	// disk.
	Stage(ctx context.Context, name string, want firmware.Digest, size int64, from io.Reader) error
	// Whole reads a file from the disk and says whether it is that one.
	Whole(name string, want firmware.Digest, size int64) (bool, error)
}

// View is what an ESP looks like.
type View struct {
	// Files are sorted by name.
	Files []firmware.BootFile
	// Next is the boot file, without counter, of the next power-on.
	Next string
	// Writable and Free, in bytes.
	Writable bool
	Free     int64
}

// Loader are the firmware's variables and the way out of this system.
type Loader interface {
	// SetOneShot makes the loader start what matches pattern, once.
	SetOneShot(pattern string) error
	// Restart restarts through the firmware. A nil error means that the end
	// of this system is near.
	Restart(ctx context.Context, why string) error
}

// Images bring an image here. They believe digests only.
type Images interface {
	// Write writes the image's file systems into a slot, from byte on, verifies
	// what it wrote, and notes each verified length. When it returns nil, all
	// of it was written, flushed, read back and found right.
	Write(ctx context.Context, slot firmware.SlotID, image firmware.Digest, from int64, note func(verified int64) error) error
	// Boot opens the image's boot file.
	Boot(ctx context.Context, image firmware.Digest) (io.ReadCloser, error)
}

// Site is what others have to say about a restart of this node.
type Site interface {
	// NeedsSnapshot: this node is a server and has taken no snapshot for image
	// yet. Snapshot takes one and copies it off the node.
	NeedsSnapshot(image firmware.Digest) bool
	Snapshot(ctx context.Context, image firmware.Digest) error
	// Turn says whether this node may restart now, and does what it takes: the
	// window, the site's lock, the drain. It is asked again and again.
	Turn(ctx context.Context, t firmware.Target) (ok bool, blocker string)
	// Settled tells how this node came out of it: it runs image, or another one
	// failed here. It gives back the turn, if this node has it, and is called
	// again and again.
	Settled(ctx context.Context, image firmware.Digest, version string, failed *firmware.FailedImage) error
	// Judging is called while the running system is not known to be healthy:
	// a turn is kept.
	Judging(ctx context.Context)
}

// Wanted is what somebody wants this node to run, and orders that are about
// its system.
type Wanted struct {
	// Image is that of the site's stack for this node; nil when nothing is
	// wanted. Why says why not, if it is not simply so that nobody wants
	// anything. Stack names the stack version (SHA-256 of its envelope): a new
	// one ends what a downgrade order said.
	Image *fleet.ImageRef
	Stack string
	Why   string
	// Orders are those of the kinds recover, clear-failed and downgrade that
	// stand, oldest first.
	Orders []fleet.Order
}

// Config says what a Keeper works with. What is not marked optional is needed.
type Config struct {
	Record Record
	ESP    ESP
	Loader Loader
	Images Images
	Site   Site
	// Running says which slot runs, by the device below dm-verity.
	Running func() (firmware.SlotID, error)
	// Health are the facts of the gate.
	Health func(ctx context.Context) firmware.Health
	Gate   firmware.Gate
	// Wanted is asked before each plan.
	Wanted func(ctx context.Context) Wanted
	// Target says what the manifest of an image says; an error is a reason to
	// wait, for people.
	Target func(ctx context.Context, ref fleet.ImageRef) (firmware.Target, error)
	// Done is told what became of an order; it keeps that before it returns.
	Done func(o fleet.Order, text string) error
	// Dir keeps notes on the data partition, Run those of this start.
	Dir, Run string
	// Tells is called when what Now returns has changed. Optional.
	Tells func()
	// Log gets each action with its reason. Optional.
	Log *slog.Logger
	// cut is a test's power cut.
	cut func(point string) error
}

// Now is where the node stands, for people, the status and the report.
type Now struct {
	// Slot runs; Image is its digest, Version what people call it.
	Slot    string          `json:"slot"`
	Image   firmware.Digest `json:"image,omitzero"`
	Version string          `json:"version,omitempty"`
	// State is firmware.UpdateState's word, Reason one sentence.
	State  string `json:"state"`
	Reason string `json:"reason"`
	// Wanted is the version that is wanted, Percent how much of it is written.
	Wanted  string `json:"wanted,omitempty"`
	Percent int    `json:"percent,omitempty"`
	// NoReturn: the wanted version raises etcd's minor; nothing leads back but
	// a snapshot.
	NoReturn bool                   `json:"no_return,omitempty"`
	Failed   []firmware.FailedImage `json:"failed,omitempty"`
	Slots    [2]firmware.Slot       `json:"slots"`
	// NeedsPerson: it does not go on by itself.
	NeedsPerson bool `json:"needs_person"`
}

// Pauses of the loop.
const (
	idlePause = 15 * time.Second
	// soonPause follows something that was done.
	soonPause = 200 * time.Millisecond
	// failPause follows something that failed; many of them in a row need a
	// person.
	failPause = 5 * time.Second
	many      = 60
	// sitting is how long an image is fetched before the loop looks again.
	sitting = 10 * time.Minute
)

// errRestart ends the loop: this system is about to end.
var errRestart = errors.New("slots: restarting")

// Keeper looks after the slots. Now may be called by anybody.
type Keeper struct {
	cfg  Config
	log  *slog.Logger
	kick chan struct{}

	mu  sync.Mutex
	now Now
	// troubles counts failures in a row.
	troubles int
}

// New checks the configuration.
func New(cfg Config) (*Keeper, error) {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("slots: config: "+what+" is missing"))
		}
	}
	check(cfg.Record != nil, "Record")
	check(cfg.ESP != nil, "ESP")
	check(cfg.Loader != nil, "Loader")
	check(cfg.Images != nil, "Images")
	check(cfg.Site != nil, "Site")
	check(cfg.Running != nil, "Running")
	check(cfg.Health != nil, "Health")
	check(cfg.Wanted != nil, "Wanted")
	check(cfg.Target != nil, "Target")
	check(cfg.Done != nil, "Done")
	check(cfg.Dir != "", "Dir")
	check(cfg.Run != "", "Run")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{cfg: cfg, log: cfg.Log, kick: make(chan struct{}, 1)}
	k.now.State, k.now.Reason = firmware.Judging.String(), "I have not looked at my slots yet."
	return k, nil
}

// Kick makes the loop look again soon.
func (k *Keeper) Kick() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// Now returns where the node stands.
func (k *Keeper) Now() Now {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now
}

// Run plans and acts until ctx ends, or this system does.
func (k *Keeper) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-k.kick:
		}
		pause, err := k.Step(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errRestart):
			<-ctx.Done()
			return nil
		case err != nil:
			k.log.Warn("the slots", "err", err)
		}
		timer.Reset(pause)
	}
}

// Step looks, plans and does what the plan says. It returns the pause before
// the next one.
func (k *Keeper) Step(ctx context.Context) (time.Duration, error) {
	f, w, err := k.facts(ctx)
	if err != nil {
		k.trouble(err)
		return failPause, err
	}
	if done, err := k.orders(ctx, f, w); done || err != nil {
		return soonPause, err
	}
	state, acts := firmware.PlanUpdate(f)
	k.tell(state, acts, f, w)
	k.settle(ctx, state, f)
	for _, a := range acts {
		if a.Kind == firmware.UpdateWait {
			return idlePause, nil
		}
		k.log.Info("slots", "state", state.String(), "action", a.Kind.String(), "slot", a.Slot.String(), "file", a.File, "to", a.To, "reason", a.Reason)
		if err := k.do(ctx, a, f); err != nil {
			if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
				// Fetching pauses now and then, so that orders are heard.
				return soonPause, nil
			}
			if !errors.Is(err, errRestart) {
				k.trouble(fmt.Errorf("%s: %w", a.Kind, err))
			}
			return failPause, err
		}
	}
	return soonPause, nil
}

// settle tells the site how it came out.
func (k *Keeper) settle(ctx context.Context, state firmware.UpdateState, f firmware.UpdateFacts) {
	var failed *firmware.FailedImage
	switch state {
	case firmware.Judging:
		k.cfg.Site.Judging(ctx)
		return
	case firmware.RolledBack:
		if x, ok := f.Meta.HasFailed(f.Target.Image); ok {
			failed = &x
		}
	case firmware.UpToDate:
	case firmware.WritingSlot, firmware.Held:
		// Something else is wanted by now, or stands in the way: no turn is kept
		// for it.
		if f.Health != firmware.Healthy {
			return
		}
	default:
		return
	}
	run := f.Meta.Slots[f.Running]
	if err := k.cfg.Site.Settled(ctx, run.Image, run.Version, failed); err != nil {
		k.log.Warn("the site was not told that this node is back", "err", err)
	}
}

func (k *Keeper) at(point string) error {
	failpoint.Hit(point)
	if k.cfg.cut != nil {
		return k.cfg.cut(point)
	}
	return nil
}

// do does one action.
func (k *Keeper) do(ctx context.Context, a firmware.UpdateAction, f firmware.UpdateFacts) error {
	if err := k.at("slots." + a.Kind.String() + ".begin"); err != nil {
		return err
	}
	if err := k.act(ctx, a, f); err != nil {
		return err
	}
	return k.at("slots." + a.Kind.String() + ".end")
}

func (k *Keeper) act(ctx context.Context, a firmware.UpdateAction, f firmware.UpdateFacts) error {
	switch a.Kind {
	case firmware.WriteMeta:
		if err := k.locked(func() error { return k.cfg.Record.Write(*a.Meta) }); err != nil {
			return err
		}
		if f.Noted {
			return nil
		}
		return k.noteStart()
	case firmware.RemoveFile:
		return k.locked(func() error { return k.cfg.ESP.Remove(a.File) })
	case firmware.RenameFile:
		return k.locked(func() error { return k.cfg.ESP.Rename(a.File, a.To) })
	case firmware.WriteImage:
		return k.write(ctx, a.Slot, f)
	case firmware.StageFile:
		return k.stage(ctx, a.File, *f.Target)
	case firmware.TakeEtcdSnapshot:
		return k.cfg.Site.Snapshot(ctx, f.Target.Image)
	case firmware.SetOneShot:
		return k.cfg.Loader.SetOneShot(a.File)
	case firmware.Restart:
		if err := k.cfg.Loader.Restart(ctx, a.Reason); err != nil {
			return err
		}
		return errRestart
	}
	return fmt.Errorf("slots: unknown action %s", a.Kind)
}

// errOther: somebody else changed the record meanwhile.
var errOther = errors.New("slots: the record was changed meanwhile; I look again")

// write writes the image. It takes minutes: the lock is held only while the
// record is written.
func (k *Keeper) write(ctx context.Context, slot firmware.SlotID, f firmware.UpdateFacts) error {
	u := *f.Meta.Update
	ctx, cancel := context.WithTimeout(ctx, sitting)
	defer cancel()
	return k.cfg.Images.Write(ctx, slot, u.Image, u.Verified, func(verified int64) error {
		if err := k.at("slots.write-image.note"); err != nil {
			return err
		}
		return k.locked(func() error {
			m, err := k.cfg.Record.Read()
			if err != nil {
				return err
			}
			if m.Update == nil || m.Update.Slot != slot || m.Update.Image != u.Image || m.Slots[slot].State != firmware.SlotWriting {
				return errOther
			}
			if verified < m.Update.Verified {
				return nil
			}
			next := *m.Update
			next.Verified = verified
			m.Update = &next
			k.progress(verified, f.Target)
			return k.cfg.Record.Write(m)
		})
	})
}

func (k *Keeper) stage(ctx context.Context, name string, t firmware.Target) error {
	ctx, cancel := context.WithTimeout(ctx, sitting)
	defer cancel()
	r, err := k.cfg.Images.Boot(ctx, t.Image)
	if err != nil {
		return err
	}
	defer r.Close()
	return k.cfg.ESP.Stage(ctx, name, t.Image, t.BootSize, r)
}
