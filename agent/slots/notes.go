package slots

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/flush"
)

// notes are what must be remembered beside the record: which orders were
// carried out, and where an order said to stay. They are of no use without the
// documents on the data partition, and lie there.
type notes struct {
	// Orders that were carried out, newest last.
	Orders []string `json:"orders,omitempty"`
	Pin    *pin     `json:"pin,omitempty"`
	// Snapshot is the image before which a snapshot was taken.
	Snapshot firmware.Digest `json:"snapshot,omitzero"`
	// Deaf: the notes were damaged. The orders that stand then are held to be
	// carried out: a node that forgot that it went into recovery would go
	// there at each start.
	Deaf bool `json:"deaf,omitempty"`
}

// pin is what a downgrade order says, as long as the site's stack is the one
// that it was about.
type pin struct {
	Order string         `json:"order"`
	Stack string         `json:"stack"`
	Image fleet.ImageRef `json:"image"`
}

const (
	notesFile = "slots.json"
	maxNotes  = 64 << 10
	// maxTicked is above what papers keep of one node's orders.
	maxTicked = 256
)

func (n notes) has(order string) bool { return slices.Contains(n.Orders, order) }

func (k *Keeper) notesPath() string { return filepath.Join(k.cfg.Dir, notesFile) }

// parseNotes reads what a program of any version wrote.
func parseNotes(b []byte) (notes, error) {
	var n notes
	if err := json.Unmarshal(b, &n); err != nil {
		return notes{}, fmt.Errorf("slots: read notes: %w", err)
	}
	if len(n.Orders) > maxTicked {
		n.Orders = n.Orders[len(n.Orders)-maxTicked:]
	}
	if n.Pin != nil && (n.Pin.Order == "" || len(n.Pin.Image.SHA256) != len(firmware.Digest{})) {
		return notes{}, errors.New("slots: read notes: the pin names no order or image")
	}
	return n, nil
}

func (k *Keeper) notes() (notes, error) {
	f, err := os.Open(k.notesPath())
	if errors.Is(err, fs.ErrNotExist) {
		return notes{}, nil
	}
	if err != nil {
		return notes{}, fmt.Errorf("slots: read notes: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxNotes+1))
	if err != nil {
		return notes{}, fmt.Errorf("slots: read notes: %w", err)
	}
	n, err := parseNotes(b)
	if len(b) > maxNotes || err != nil {
		k.log.Warn("my notes about orders are damaged; the orders that stand count as carried out", "err", err)
		return notes{Deaf: true}, nil
	}
	return n, nil
}

func (k *Keeper) writeNotes(n notes) error {
	if err := os.MkdirAll(k.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("slots: write notes: %w", err)
	}
	n.Orders = n.Orders[max(0, len(n.Orders)-maxTicked):]
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("slots: write notes: %w", err)
	}
	return writeFile(k.notesPath(), append(b, '\n'))
}

// writeFile replaces a file and flushes it and its folder.
func writeFile(path string, b []byte) error {
	if err := renameio.WriteFile(path, b, 0o600, renameio.WithTempDir(filepath.Dir(path))); err != nil {
		return fmt.Errorf("slots: write %s: %w", path, err)
	}
	if err := flush.Dir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("slots: %w", err)
	}
	return nil
}

// hearAgain begins new notes after damaged ones.
func (k *Keeper) hearAgain(standing []fleet.Order) error {
	var n notes
	for _, o := range standing {
		n.Orders = append(n.Orders, o.ID)
	}
	return k.writeNotes(n)
}

// tick notes that an order was carried out, and tells.
func (k *Keeper) tick(o fleet.Order) error {
	if err := k.cfg.Done(o, "The order was carried out."); err != nil {
		return err
	}
	n, err := k.notes()
	if err != nil {
		return err
	}
	n.Orders = append(n.Orders, o.ID)
	return k.writeNotes(n)
}

func (k *Keeper) setPin(o fleet.Order, stack string) error {
	if o.Image == nil {
		return errors.New("it names no image")
	}
	n, err := k.notes()
	if err != nil {
		return err
	}
	n.Pin = &pin{Order: o.ID, Stack: stack, Image: *o.Image}
	return k.writeNotes(n)
}

// startFile says that this start of the machine is counted in the record.
const startFile = "start-noted"

// startNoted and noteStart know one start of the machine from the next by a
// file in a volatile directory.
func (k *Keeper) startNoted() bool {
	_, err := os.Stat(filepath.Join(k.cfg.Run, startFile))
	return err == nil
}

func (k *Keeper) noteStart() error {
	if err := os.MkdirAll(k.cfg.Run, 0o755); err != nil {
		return fmt.Errorf("slots: note the start: %w", err)
	}
	if err := os.WriteFile(filepath.Join(k.cfg.Run, startFile), nil, 0o600); err != nil {
		return fmt.Errorf("slots: note the start: %w", err)
	}
	return nil
}

// clearFailed forgets that an image failed here. Its slot is written anew: what
// is in it may be why it failed.
func (k *Keeper) clearFailed(digest []byte, running firmware.SlotID) error {
	if len(digest) != len(firmware.Digest{}) {
		return errors.New("it names no image")
	}
	return k.locked(func() error {
		m, err := k.cfg.Record.Read()
		if err != nil {
			return err
		}
		return k.cfg.Record.Write(m.Forgive(firmware.Digest(digest), running))
	})
}

// recovery makes the next start one of recovery.
func (k *Keeper) recovery(why string) error {
	return k.locked(func() error { return toRecovery(k.cfg.Record, k.cfg.Loader, why) })
}

func toRecovery(r Record, l Loader, why string) error {
	m, err := r.Read()
	if err != nil {
		return err
	}
	m.Recovery = clip(why)
	if err := r.Write(m); err != nil {
		return err
	}
	return l.SetOneShot(firmware.RecoveryPattern)
}

// clip keeps a text within what the record takes.
func clip(s string) string {
	const most = 400
	return strings.ToValidUTF8(s[:min(len(s), most)], "")
}
