package main

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/muster-edge/muster/agent/data"
)

func TestDiskKeyIsKeptOnlyWhenTheCentreSaysSo(t *testing.T) {
	blob, centre := []byte("sealed"), false
	var fail, told error
	note := filepath.Join(t.TempDir(), "disk-key.kept")
	start := func() *diskKey {
		return &diskKey{note: note, say: func(err error) { told = err },
			read: func() ([]byte, error) {
				if blob == nil {
					return nil, fs.ErrNotExist
				}
				return blob, nil
			},
			give: func(context.Context, []byte) (bool, bool, error) { return centre, true, fail }}
	}
	shown := func(d *diskKey) string {
		r := data.Report{Escrow: data.EscrowSealed}
		d.seen(&r)
		return r.Escrow
	}
	d := start()
	fail = errors.New("the centre is away")
	if p := d.step(t.Context()); p != diskKeyRetry || shown(d) != data.EscrowSealed || told == nil {
		t.Fatal(p, shown(d), told)
	}
	centre, fail = true, errors.New("no peer is heard")
	if p := d.step(t.Context()); p != diskKeyRetry || shown(d) != data.EscrowKept {
		t.Fatal(p, shown(d))
	}
	fail = nil
	if p := d.step(t.Context()); p != diskKeyAgain || told != nil {
		t.Fatal(p, told)
	}
	// After a restart without the centre it is known still; of another key it
	// is not.
	centre, fail = false, errors.New("the centre is away")
	d = start()
	d.step(t.Context())
	if shown(d) != data.EscrowKept {
		t.Fatal("it was forgotten")
	}
	blob = []byte("a new one")
	d.step(t.Context())
	if shown(d) != data.EscrowSealed {
		t.Fatal("a key that nobody has is shown as kept")
	}
	blob = nil
	if p := d.step(t.Context()); p != diskKeyAgain || told != nil {
		t.Fatal(p, told)
	}
	r := data.Report{Escrow: data.EscrowNone}
	if d.kept.Store(true); true {
		d.seen(&r)
	}
	if r.Escrow != data.EscrowNone {
		t.Fatal("there is no key, and it is shown as kept")
	}
}
