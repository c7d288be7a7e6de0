package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/internal/sleep"
)

const (
	// diskKeyRetry is the pause while somebody has not got the key yet,
	// diskKeyAgain that after which it is offered once more: a centre may have
	// been restored, a peer may be new.
	diskKeyRetry = 5 * time.Minute
	diskKeyAgain = 24 * time.Hour
	diskKeyLimit = 2 * time.Minute
)

// diskKey brings the sealed recovery key of the data partition to the centre
// and to a peer.
type diskKey struct {
	// read returns the sealed key; fs.ErrNotExist: there is none.
	read func() ([]byte, error)
	// give is Member.EscrowDiskKey.
	give func(ctx context.Context, blob []byte) (centre, peer bool, err error)
	// note is a file with the digest of the key that the centre acknowledged.
	note string
	// say takes what went wrong, nil if nothing did.
	say func(error)

	kept atomic.Bool
}

// step offers the key once and returns the pause before the next time.
func (d *diskKey) step(ctx context.Context) time.Duration {
	blob, err := d.read()
	if errors.Is(err, fs.ErrNotExist) {
		d.kept.Store(false)
		d.say(nil)
		return diskKeyAgain
	}
	if err != nil {
		d.say(err)
		return diskKeyRetry
	}
	digest := sha256.Sum256(blob)
	name := hex.EncodeToString(digest[:])
	old, _ := os.ReadFile(d.note) // without it the key is offered, and noted again
	d.kept.Store(strings.TrimSpace(string(old)) == name)
	ctx, cancel := context.WithTimeout(ctx, diskKeyLimit)
	defer cancel()
	centre, _, err := d.give(ctx, blob)
	if centre && !d.kept.Load() {
		if werr := renameio.WriteFile(d.note, []byte(name+"\n"), 0o644); werr != nil {
			d.say(werr)
			return diskKeyRetry
		}
		d.kept.Store(true)
	}
	d.say(err)
	if err != nil {
		return diskKeyRetry
	}
	return diskKeyAgain
}

func (d *diskKey) run(ctx context.Context) error {
	for {
		if sleep.For(ctx, d.step(ctx)) != nil {
			return nil
		}
	}
}

// seen puts into a report what data cannot know: that the centre has the key.
func (d *diskKey) seen(r *data.Report) {
	if r.Escrow == data.EscrowSealed && d.kept.Load() {
		r.Escrow = data.EscrowKept
	}
}
