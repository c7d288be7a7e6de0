package audit

import (
	"fmt"
	"slices"
)

// BreakError names the first place where a chain does not hold.
type BreakError struct {
	Tenant string
	// Seq is the sequence number that should stand at this place.
	Seq uint64
	// Why is a sentence for a person.
	Why string
}

// Error implements error.
func (e *BreakError) Error() string {
	return fmt.Sprintf("audit: chain of tenant %q breaks at record %d: %s", e.Tenant, e.Seq, e.Why)
}

// Verifier checks a chain record by record in constant memory.
type Verifier struct {
	tenant string
	head   Head
	pins   []Head
	err    error
}

// NewVerifier returns a verifier of tenant's chain that starts behind from
// (the zero Head: at the first record). Each pin is a Head that the chain
// must have passed through.
func NewVerifier(tenant string, from Head, pins ...Head) *Verifier {
	v := &Verifier{tenant: tenant, head: from, pins: slices.Clone(pins)}
	for _, p := range pins {
		if p.Count == from.Count && p != from {
			v.fail(from.Count, "the chain starts behind another record than the pinned one")
		}
	}
	return v
}

// Head returns the head of the part that was found good.
func (v *Verifier) Head() Head { return v.head }

// Add checks the next record. After the first error, which is a *BreakError,
// it returns the same one for ever.
func (v *Verifier) Add(r Record) error {
	if v.err != nil {
		return v.err
	}
	want := v.head.Count + 1
	switch {
	case r.Seq != want:
		return v.fail(want, fmt.Sprintf("record %d stands in its place (deleted, inserted or swapped)", r.Seq))
	case r.Tenant != v.tenant:
		return v.fail(want, fmt.Sprintf("it belongs to tenant %.80q", r.Tenant))
	case r.Prev != v.head.Hash:
		return v.fail(want, "it does not follow the record before it")
	}
	if err := sound(r); err != nil {
		return v.fail(want, err.Error())
	}
	for _, p := range v.pins {
		if p.Count == r.Seq && p.Hash != r.Hash {
			return v.fail(want, "it is another record than the pinned one")
		}
	}
	v.head = HeadOf(r)
	return nil
}

// Finish reports whether the chain reached every pin: a pin behind its end
// means that records were cut off.
func (v *Verifier) Finish() error {
	if v.err != nil {
		return v.err
	}
	for _, p := range v.pins {
		if p.Count > v.head.Count {
			return v.fail(v.head.Count+1, fmt.Sprintf("the chain ends here, but had %d records when it was pinned", p.Count))
		}
	}
	return nil
}

func (v *Verifier) fail(seq uint64, why string) error {
	v.err = &BreakError{Tenant: v.tenant, Seq: seq, Why: why}
	return v.err
}

// Verify checks the whole chain of one tenant, from its first record. The
// error is a *BreakError that names the first bad record.
func Verify(records []Record, pins ...Head) error {
	tenant := ""
	if len(records) > 0 {
		tenant = records[0].Tenant
	}
	v := NewVerifier(tenant, Head{}, pins...)
	for _, r := range records {
		if err := v.Add(r); err != nil {
			return err
		}
	}
	return v.Finish()
}
