package fleet

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Selector picks objects by their labels, in the words of Kubernetes:
// "region=north,tier!=lab,env in (a,b),env notin (c),gpu,!old". All of its
// terms must hold. The zero Selector picks everything.
type Selector struct{ terms []term }

// term is one condition: the label's value is one of values, or, with not, it
// is none of them. No values: the label is there, or, with not, it is not.
type term struct {
	key    string
	not    bool
	values []string
}

// Bounds of a selector.
const (
	MaxSelector      = 1024
	maxSelectorTerms = 16
)

// ParseSelector reads a selector. "" is the one that picks everything.
func ParseSelector(s string) (Selector, error) {
	if len(s) > MaxSelector {
		return Selector{}, fmt.Errorf("fleet: read selector: %d characters, at most %d are allowed", len(s), MaxSelector)
	}
	if strings.TrimSpace(s) == "" {
		return Selector{}, nil
	}
	var out Selector
	for _, part := range splitTerms(s) {
		t, err := parseTerm(strings.TrimSpace(part))
		if err != nil {
			return Selector{}, fmt.Errorf("fleet: read selector %q: %w", clip(s, 80), err)
		}
		out.terms = append(out.terms, t)
	}
	if len(out.terms) > maxSelectorTerms {
		return Selector{}, fmt.Errorf("fleet: read selector: %d terms, at most %d are allowed", len(out.terms), maxSelectorTerms)
	}
	return out, nil
}

// splitTerms cuts at commas outside of parentheses.
func splitTerms(s string) []string {
	var out []string
	depth, from := 0, 0
	for i := range len(s) {
		switch s[i] {
		case '(':
			depth++
		case ')':
			depth--
		case ',':
			if depth == 0 {
				out, from = append(out, s[from:i]), i+1
			}
		}
	}
	return append(out, s[from:])
}

func parseTerm(s string) (term, error) {
	for _, op := range []string{"!=", "==", "="} {
		if key, value, found := strings.Cut(s, op); found {
			return newTerm(key, op == "!=", []string{value})
		}
	}
	for _, op := range []string{" notin ", " in "} {
		if key, set, found := strings.Cut(s, op); found {
			inner, open := strings.CutPrefix(strings.TrimSpace(set), "(")
			inner, closed := strings.CutSuffix(inner, ")")
			if !open || !closed {
				return term{}, fmt.Errorf("%q: want KEY in (VALUE,...)", clip(s, 80))
			}
			return newTerm(key, op == " notin ", strings.Split(inner, ","))
		}
	}
	key, not := strings.CutPrefix(s, "!")
	return newTerm(key, not, nil)
}

func newTerm(key string, not bool, values []string) (term, error) {
	t := term{key: strings.TrimSpace(key), not: not}
	if err := ValidateLabels(map[string]string{t.key: ""}); err != nil {
		return t, fmt.Errorf("%q is no label key", clip(t.key, 80))
	}
	for _, v := range values {
		v = strings.TrimSpace(v)
		if err := ValidateLabels(map[string]string{"v": v}); err != nil {
			return t, fmt.Errorf("%q is no label value", clip(v, 80))
		}
		t.values = append(t.values, v)
	}
	slices.Sort(t.values)
	t.values = slices.Compact(t.values)
	return t, nil
}

// Empty reports whether the selector picks everything.
func (s Selector) Empty() bool { return len(s.terms) == 0 }

// Equal reports whether two selectors have the same canonical form.
func (s Selector) Equal(o Selector) bool { return s.String() == o.String() }

// Matches reports whether the labels hold all terms. As in Kubernetes, "!="
// and "notin" hold also where the label is missing.
func (s Selector) Matches(labels map[string]string) bool {
	for _, t := range s.terms {
		v, there := labels[t.key]
		holds := there && (t.values == nil || slices.Contains(t.values, v))
		if holds == t.not {
			return false
		}
	}
	return true
}

// String returns the canonical form, which ParseSelector reads.
func (s Selector) String() string {
	out := make([]string, 0, len(s.terms))
	for _, t := range s.terms {
		switch {
		case t.values == nil && t.not:
			out = append(out, "!"+t.key)
		case t.values == nil:
			out = append(out, t.key)
		case len(t.values) == 1 && t.not:
			out = append(out, t.key+"!="+t.values[0])
		case len(t.values) == 1:
			out = append(out, t.key+"="+t.values[0])
		case t.not:
			out = append(out, t.key+" notin ("+strings.Join(t.values, ",")+")")
		default:
			out = append(out, t.key+" in ("+strings.Join(t.values, ",")+")")
		}
	}
	return strings.Join(out, ",")
}

// MarshalText implements encoding.TextMarshaler.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Selector) UnmarshalText(b []byte) error {
	p, err := ParseSelector(string(b))
	if err == nil {
		*s = p
	}
	return err
}

// SiteLabel is the label by which a selector names one site: every site has
// it, with its own name as value, and nobody can set another.
const SiteLabel = "muster/site"

// SelectLabels are the labels that selectors see of a site.
func (s Site) SelectLabels() map[string]string {
	labels := make(map[string]string, len(s.Labels)+1)
	maps.Copy(labels, s.Labels)
	labels[SiteLabel] = s.Name
	return labels
}
