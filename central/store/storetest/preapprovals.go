package storetest

import (
	"context"
	"errors"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

func claimHash(code string) fleet.HexBytes { h := hash(code); return h[:] }

func failed[T any](_ T, err error) error { return err }

// got reads in a transaction of its own.
func got[T any](s *suite, read func(store.Reader) (T, error)) (v T) {
	s.Helper()
	s.view(func(t store.Reader) (err error) { v, err = read(t); return err })
	return v
}

func (s *suite) preApproval(name string, kind fleet.PreApprovalKind, edit func(*fleet.PreApproval)) fleet.PreApproval {
	p := fleet.PreApproval{Meta: fleet.Meta{Tenant: "one", Name: name}, Kind: kind, Limit: 2, NotAfter: Start}
	if edit != nil {
		edit(&p)
	}
	s.update(func(t store.Tx) (err error) { p, err = t.PutPreApproval(p); return err })
	return p
}

func (s *suite) listed() {
	ek, other := fleet.EKHash(hash("a")), fleet.EKHash(hash("b"))
	line := fleet.ListedEK{EK: ek, Serial: "S", Site: "shop", Labels: map[string]string{"a": "b"}}
	p := s.preApproval("list", fleet.PreApproveEKs, func(p *fleet.PreApproval) { p.EKs = []fleet.ListedEK{line} })
	if len(p.EKs) != 0 || p.Revision != 1 {
		s.Errorf("after the insert: %+v", p)
	}
	lines := func(ek fleet.EKHash) (out []store.ListLine) {
		out = got(s, func(t store.Reader) ([]store.ListLine, error) { return t.LinesOfEK("one", ek) })
		return out
	}
	same(s, "lines", []store.ListLine{{PreApproval: "list", ListedEK: line}}, first(lines(ek), nil))
	if got := lines(other); len(got) != 0 {
		s.Errorf("lines of another EK: %+v", got)
	}
	s.view(func(t store.Reader) error {
		if got, err := t.LinesOfEK("two", ek); err != nil || len(got) != 0 {
			s.Errorf("another tenant sees %+v, %v", got, err)
		}
		return nil
	})
	if err := s.store.Update(context.Background(), func(t store.Tx) error {
		q := p
		q.EKs = []fleet.ListedEK{{EK: other}}
		_, err := t.PutPreApproval(q)
		return err
	}); err == nil {
		s.Error("the lines of a list were changed")
	}
	p.Withdrawn = true
	s.update(func(t store.Tx) (err error) { p, err = t.PutPreApproval(p); return err })
	if len(lines(ek)) != 0 {
		s.Error("a withdrawn list still lists")
	}
	p.Withdrawn = false
	s.update(func(t store.Tx) (err error) { _, err = t.PutPreApproval(p); return err })
	if !got(s, func(t store.Reader) (fleet.PreApproval, error) { return t.PreApproval("one", "list") }).Withdrawn {
		s.Error("what was withdrawn is back")
	}
	if len(lines(ek)) != 0 {
		s.Error("the lines of what was withdrawn are back")
	}
}

func (s *suite) claims() {
	p := s.preApproval("claim", fleet.PreApproveClaim, func(p *fleet.PreApproval) { p.ClaimHash = claimHash("code") })
	s.preApproval("rule", fleet.PreApproveRule, nil)
	gone := s.preApproval("gone", fleet.PreApproveRule, nil)
	gone.Withdrawn = true
	s.update(func(t store.Tx) error { _, err := t.PutPreApproval(gone); return err })
	s.view(func(t store.Reader) error {
		same(s, "by claim", p, first(t.PreApprovalByClaim("one", claimHash("code"))))
		for what, err := range map[string]error{
			"another code":   failed(t.PreApprovalByClaim("one", claimHash("other"))),
			"no code":        failed(t.PreApprovalByClaim("one", nil)),
			"another tenant": failed(t.PreApprovalByClaim("two", claimHash("code"))),
		} {
			if !errors.Is(err, store.ErrNotFound) {
				s.Errorf("%s: %v", what, err)
			}
		}
		return nil
	})
	rules := got(s, func(t store.Reader) ([]fleet.PreApproval, error) {
		return t.PreApprovalsOfKind("one", fleet.PreApproveRule)
	})
	all := got(s, func(t store.Reader) ([]fleet.PreApproval, error) { return t.PreApprovals("one") })
	if len(rules) != 1 || rules[0].Name != "rule" || len(all) != 3 {
		s.Errorf("rules %+v of %d", rules, len(all))
	}
	err := s.store.Update(context.Background(), func(t store.Tx) error {
		_, err := t.PutPreApproval(fleet.PreApproval{Meta: fleet.Meta{Tenant: "one", Name: "twin"}, Kind: fleet.PreApproveClaim, Limit: 1, ClaimHash: claimHash("code")})
		return err
	})
	if !errors.Is(err, store.ErrExists) {
		s.Errorf("a second pre-approval with the same code: %v", err)
	}
}

func (s *suite) uses() {
	var requests []fleet.Request
	for _, name := range []string{"a", "b", "c"} {
		r := Request("one", name, "")
		requests = append(requests, r)
		s.update(func(t store.Tx) error { return t.AddRequest(r) })
	}
	a, b, c := requests[0], requests[1], requests[2]
	s.preApproval("rule", fleet.PreApproveRule, nil)
	s.preApproval("spare", fleet.PreApproveRule, nil)
	s.preApproval("list", fleet.PreApproveEKs, func(p *fleet.PreApproval) {
		p.EKs = []fleet.ListedEK{{EK: c.Evidence.EK}, {EK: fleet.EKHash(hash("z"))}}
	})
	use := func(name string, r fleet.Request, ek fleet.EKHash, at time.Time) error {
		return s.store.Update(context.Background(), func(t store.Tx) error {
			return t.UsePreApproval(store.Use{Tenant: "one", PreApproval: name, EK: ek, Request: r.ID, At: at})
		})
	}
	for _, step := range []struct {
		what, name string
		r          fleet.Request
		ek         fleet.EKHash
		want       error
	}{
		{"not there", "nothing", a, a.Evidence.EK, store.ErrNotFound},
		{"first", "rule", a, a.Evidence.EK, nil},
		{"the same machine again", "rule", a, a.Evidence.EK, store.ErrConflict},
		{"a request that another approved", "spare", a, a.Evidence.EK, store.ErrConflict},
		{"second", "rule", b, b.Evidence.EK, nil},
		{"used up", "rule", c, c.Evidence.EK, store.ErrConflict},
		{"not listed", "list", c, a.Evidence.EK, store.ErrConflict},
		{"listed", "list", c, c.Evidence.EK, nil},
		{"the line again", "list", c, c.Evidence.EK, store.ErrConflict},
	} {
		if err := use(step.name, step.r, step.ek, Start.Add(time.Hour)); !errors.Is(err, step.want) || step.want == nil && err != nil {
			s.Errorf("%s: %v, want %v", step.what, err, step.want)
		}
	}
	s.view(func(t store.Reader) error {
		for _, c := range []struct {
			name  string
			after time.Duration
			want  int
		}{{"rule", 0, 2}, {"rule", time.Hour, 0}, {"spare", 0, 0}, {"list", 0, 1}} {
			if n, err := t.CountUses("one", c.name, Start.Add(c.after)); err != nil || n != c.want {
				s.Errorf("uses of %s after %s: %d, %v; want %d", c.name, c.after, n, err, c.want)
			}
		}
		return nil
	})
	if p := got(s, func(t store.Reader) (fleet.PreApproval, error) { return t.PreApproval("one", "rule") }); p.Used != 2 {
		s.Errorf("used %d times", p.Used)
	}
	for node, want := range map[fleet.NodeID]int{a.Node: 1, c.Node: 1, fleet.EKHash(hash("z")).NodeID(): 0} {
		if n := got(s, func(t store.Reader) (int, error) { return t.CountUsesOfNode("one", node) }); n != want {
			s.Errorf("%d uses for %s, want %d", n, node, want)
		}
	}
	lines := got(s, func(t store.Reader) ([]store.ListLine, error) { return t.LinesOfEK("one", c.Evidence.EK) })
	if len(lines) != 1 || lines[0].Request != c.ID {
		s.Errorf("lines: %+v", lines)
	}
}
