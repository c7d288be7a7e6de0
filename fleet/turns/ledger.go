package turns

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// Format is the value of "format" in a stored ledger.
const Format = "muster/turns/v1"

// MaxLedger bounds a stored ledger, in bytes.
const MaxLedger = 64 << 10

type stored struct {
	Format string `json:"format"`
	Ledger
}

// Encode returns the ledger as it is stored.
func (l Ledger) Encode() ([]byte, error) {
	b, err := json.Marshal(stored{Format, l})
	if err != nil {
		return nil, fmt.Errorf("turns: write ledger: %w", err)
	}
	// What cannot be read back must not be written.
	if _, err := Decode(b); err != nil {
		return nil, err
	}
	return b, nil
}

// Decode reads a stored ledger. Whoever administers the cluster can write
// anything there; the worst that comes of it is that nobody restarts.
func Decode(b []byte) (Ledger, error) {
	if len(b) > MaxLedger {
		return Ledger{}, fmt.Errorf("turns: read ledger: %d bytes, at most %d", len(b), MaxLedger)
	}
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return Ledger{}, fmt.Errorf("turns: read ledger: %w", err)
	}
	var errs []error
	check := func(ok bool, format string, a ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("turns: read ledger: "+format, a...))
		}
	}
	check(s.Format == Format, "format %.40q", s.Format)
	text := func(what, x string) { check(len(x) <= maxText, "%s has %d bytes", what, len(x)) }
	image := func(x string) {
		d, err := hex.DecodeString(x)
		check(err == nil && len(d) == 32, "image %.80q is no digest", x)
	}
	if t := s.Turn; t != nil {
		errs = append(errs, t.Node.Validate())
		image(t.Image)
		text("version", t.Version)
	}
	check(len(s.Failed) <= MaxFailed, "%d failed images", len(s.Failed))
	for _, f := range s.Failed[:min(len(s.Failed), MaxFailed)] {
		errs = append(errs, f.Node.Validate())
		image(f.Image)
		text("version", f.Version)
		text("reason", f.Reason)
	}
	if err := errors.Join(errs...); err != nil {
		return Ledger{}, err
	}
	return s.Ledger, nil
}
