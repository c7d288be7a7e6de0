// Package api converts between the objects of package fleet and the protobuf
// messages of muster/v1. The functions are pure. ...ToProto never fails;
// ...FromProto takes messages from the network and refuses lengths, states
// and times that fleet could not hold, reporting every problem. It does not
// validate the object: that is the object's Validate.
//
// The generated code is in the folders muster/v1 and peer/v1.
package api

import (
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// stamp returns nil for the zero time, so that "never" stays "never".
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// reading collects the problems of one message.
type reading struct{ problems []error }

func (r *reading) err(what string) error {
	if len(r.problems) == 0 {
		return nil
	}
	return fmt.Errorf("api: read %s: %w", what, errors.Join(r.problems...))
}

// maxProblems bounds what a hostile message can make us collect.
const maxProblems = 32

func (r *reading) fail(format string, args ...any) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, fmt.Errorf(format, args...))
	}
}

func (r *reading) time(field string, t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	if err := t.CheckValid(); err != nil {
		r.fail("%s: %w", field, err)
		return time.Time{}
	}
	return t.AsTime()
}

// bytes32 takes 32 bytes, or none for the zero value.
func (r *reading) bytes32(field string, b []byte) (out [32]byte) {
	if len(b) != 0 && len(b) != len(out) {
		r.fail("%s has %d bytes, want 32", field, len(b))
		return out
	}
	copy(out[:], b)
	return out
}

func (r *reading) int(field string, v int64) int {
	if v > math.MaxInt32 || v < math.MinInt32 {
		r.fail("%s: %d is out of range", field, v)
		return 0
	}
	return int(v)
}

// enum takes the number of an enum whose last value is last.
func enum[F ~uint8, P ~int32](r *reading, field string, v P, last F) F {
	if v < 0 || int32(v) > int32(last) {
		r.fail("%s: no such value %d", field, v)
		return 0
	}
	return F(v)
}

// zero32 gives nil for the zero value.
func zero32[T ~[32]byte](v T) []byte {
	if v == (T{}) {
		return nil
	}
	b := [32]byte(v)
	return b[:]
}

func aliasesToProto(list []fleet.EKHash) [][]byte {
	out := make([][]byte, 0, len(list))
	for _, h := range list {
		out = append(out, h[:])
	}
	return out
}

const maxAliases = 16

func (r *reading) aliases(list [][]byte) []fleet.EKHash {
	if len(list) > maxAliases {
		r.fail("%d EK aliases, at most %d are allowed", len(list), maxAliases)
		return nil
	}
	var out []fleet.EKHash
	for _, b := range list {
		if len(b) != 32 {
			r.fail("EK alias has %d bytes, want 32", len(b))
			continue
		}
		out = append(out, fleet.EKHash(b))
	}
	return out
}

func metaToProto(m fleet.Meta) *musterv1.Meta {
	return &musterv1.Meta{
		Tenant: m.Tenant, Name: m.Name, Labels: m.Labels, Generation: m.Generation, Revision: m.Revision,
		Created: stamp(m.Created), Updated: stamp(m.Updated),
	}
}

func (r *reading) meta(m *musterv1.Meta) fleet.Meta {
	return fleet.Meta{
		Tenant: m.GetTenant(), Name: m.GetName(), Labels: m.GetLabels(), Generation: m.GetGeneration(),
		Revision: m.GetRevision(), Created: r.time("created", m.GetCreated()), Updated: r.time("updated", m.GetUpdated()),
	}
}

func docVersionToProto(v fleet.DocVersion) *musterv1.DocVersion {
	if v == (fleet.DocVersion{}) {
		return nil
	}
	return &musterv1.DocVersion{Epoch: v.Epoch, N: v.N}
}

func docVersion(v *musterv1.DocVersion) fleet.DocVersion {
	return fleet.DocVersion{Epoch: v.GetEpoch(), N: v.GetN()}
}

// DocVersionToProto converts a version; the zero one becomes nil.
func DocVersionToProto(v fleet.DocVersion) *musterv1.DocVersion { return docVersionToProto(v) }

// DocVersion converts a version; nil becomes the zero one.
func DocVersion(v *musterv1.DocVersion) fleet.DocVersion { return docVersion(v) }
