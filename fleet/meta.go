package fleet

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Meta is what every object of the management plane carries. It is embedded,
// so that its fields appear beside the object's own ones in JSON.
type Meta struct {
	// Tenant owns the object. It is part of every key and of every query.
	Tenant string `json:"tenant"`
	// Name is unique among the tenant's objects of one kind: a DNS label.
	Name string `json:"name"`
	// Labels select objects; the forms are those of Kubernetes.
	Labels map[string]string `json:"labels,omitempty"`
	// Generation counts the changes of what people want; reports echo it.
	Generation int64 `json:"generation,omitempty"`
	// Revision counts all writes. Who changes the object names the revision
	// that was read, so that no change is lost (optimistic locking).
	Revision int64     `json:"revision,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	Updated  time.Time `json:"updated,omitzero"`
}

// validate adds the problems of the common part to p.
func (m Meta) validate(p *problems, kind string) {
	p.add(ValidateName("tenant", m.Tenant))
	p.add(ValidateName(kind, m.Name))
	p.add(ValidateLabels(m.Labels))
	p.check(m.Generation >= 0, "generation %d is negative", m.Generation)
	p.check(m.Revision >= 0, "revision %d is negative", m.Revision)
}

// Limits of labels: the same as in Kubernetes, since Admission labels become
// labels of k3s nodes.
const (
	MaxLabels     = 64
	maxLabelPart  = 63
	maxLabelRealm = 253
)

var (
	labelPartForm  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$`)
	labelRealmForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
)

// ValidateLabels checks keys and values against the label syntax of
// Kubernetes (optional DNS prefix and '/', then at most 63 characters).
func ValidateLabels(labels map[string]string) error {
	var p problems
	p.check(len(labels) <= MaxLabels, "%d labels, at most %d are allowed", len(labels), MaxLabels)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if len(p.list) > 8 {
			break
		}
		realm, part, split := strings.Cut(k, "/")
		if !split {
			realm, part = "", k
		}
		good := len(part) <= maxLabelPart && labelPartForm.MatchString(part) &&
			(!split || len(realm) <= maxLabelRealm && labelRealmForm.MatchString(realm))
		p.check(good, "label key %q: want [prefix/]name, name 1-63 characters A-Z a-z 0-9 - _ .", clip(k, 80))
		v := labels[k]
		p.check(v == "" || len(v) <= maxLabelPart && labelPartForm.MatchString(v),
			"value %q of label %q: want at most 63 characters A-Z a-z 0-9 - _ .", clip(v, 80), clip(k, 80))
	}
	return p.err("labels")
}

// Digest is a SHA-256 value that people see as lower-case hex.
type Digest [32]byte

// String returns 64 lower-case hex digits.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether no digest was set.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler. It wants 64 hex digits.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) != 2*len(d) {
		return fmt.Errorf("fleet: read digest: want 64 hex digits, got %q", clip(string(b), 80))
	}
	var v Digest
	if _, err := hex.Decode(v[:], b); err != nil {
		return fmt.Errorf("fleet: read digest: %w", err)
	}
	*d = v
	return nil
}

// DocVersion orders the signed documents of the centre. Epoch counts the
// lives of the centre's database and is raised when a backup is restored: a
// document of the restored centre is then never mistaken for an older one
// that carries the same n. The text form is "epoch.n".
type DocVersion struct {
	Epoch uint64
	N     uint64
}

// Compare returns -1, 0 or 1 as v is older than, equal to or newer than w.
func (v DocVersion) Compare(w DocVersion) int {
	switch {
	case v.Epoch < w.Epoch, v.Epoch == w.Epoch && v.N < w.N:
		return -1
	case v == w:
		return 0
	}
	return 1
}

// String returns "epoch.n".
func (v DocVersion) String() string { return fmt.Sprintf("%d.%d", v.Epoch, v.N) }

// MarshalText implements encoding.TextMarshaler.
func (v DocVersion) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (v *DocVersion) UnmarshalText(b []byte) error {
	p, err := ParseDocVersion(string(b))
	if err == nil {
		*v = p
	}
	return err
}

// ParseDocVersion reads "epoch.n", two decimal numbers without leading zeros.
func ParseDocVersion(s string) (DocVersion, error) {
	e, n, ok := strings.Cut(s, ".")
	epoch, errE := strconv.ParseUint(e, 10, 64)
	number, errN := strconv.ParseUint(n, 10, 64)
	v := DocVersion{Epoch: epoch, N: number}
	// The comparison refuses "+1", "01" and other second spellings.
	if !ok || errE != nil || errN != nil || v.String() != s {
		return DocVersion{}, fmt.Errorf("fleet: read document version: want EPOCH.N, got %q", clip(s, 80))
	}
	return v, nil
}

// problems collects everything that is wrong with an object, so that a person
// can mend all of it at once.
type problems struct{ list []error }

func (p *problems) add(err error) {
	if err != nil {
		p.list = append(p.list, err)
	}
}

func (p *problems) check(ok bool, format string, args ...any) {
	if !ok {
		p.list = append(p.list, fmt.Errorf(format, args...))
	}
}

func (p *problems) err(object string) error {
	if len(p.list) == 0 {
		return nil
	}
	return fmt.Errorf("fleet: %s: %w", object, errors.Join(p.list...))
}
