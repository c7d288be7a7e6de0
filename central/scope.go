package central

import (
	"errors"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// part is what one caller sees of a tenant. It lives as long as a call and
// remembers the sites it has looked up.
//
// This is the service layer that every method uses, from the API or from the
// console: single objects by findRequest, findNode, findSite, findOrder, which
// answer "there is none" for what the caller must not know of; lists filtered
// by sees; acts allowed by may.
type part struct {
	caller
	t      store.Reader
	labels map[string]map[string]string
}

// part begins to look at the tenant with the caller's eyes.
func (c caller) part(t store.Reader) *part {
	return &part{c, t, make(map[string]map[string]string)}
}

// object is what Allow wants to know of something at a site.
func (p *part) object(kind access.Kind, site string) (access.Object, error) {
	o := access.Object{Kind: kind, Tenant: p.Tenant, Site: site}
	if site == "" {
		return o, nil
	}
	labels, known := p.labels[site]
	if !known {
		v, err := p.t.Site(p.Tenant, site)
		switch {
		case errors.Is(err, store.ErrNotFound):
			// One that is about to be made: its name is all there is to it.
			v.Name = site
		case err != nil:
			return o, err
		}
		labels = v.SelectLabels()
		p.labels[site] = labels
	}
	o.Labels = labels
	return o, nil
}

func (p *part) allow(kind access.Kind, verb access.Verb, site string) (access.Decision, error) {
	if rule, known := access.RuleOf(kind, verb); known && p.Unlimited() >= rule.Role && rule.Reach != access.OverAll {
		return access.Decision{Answer: access.Allowed}, nil // the common case needs no site
	}
	o, err := p.object(kind, site)
	if err != nil {
		return access.Decision{}, err
	}
	return access.Allow(p.Principal, verb, o), nil
}

// sees reports whether the caller may read something that belongs to a site,
// or to none.
func (p *part) sees(kind access.Kind, site string) (bool, error) {
	d, err := p.allow(kind, access.Read, site)
	return d.Answer == access.Allowed, err
}

// seesAll reports whether nothing of this kind is hidden from the caller.
func (p *part) seesAll(kind access.Kind) bool {
	rule, known := access.RuleOf(kind, access.Read)
	return known && p.Unlimited() >= rule.Role
}

// may returns the error for an act that the caller may not do.
func (p *part) may(kind access.Kind, verb access.Verb, site string) error {
	d, err := p.allow(kind, verb, site)
	if err != nil {
		return err
	}
	return refused(d, func() error {
		if site == "" {
			return connect.NewError(connect.CodePermissionDenied, errors.New(d.Why))
		}
		return noSite(p.Tenant, site)
	})
}

// mayMake is may for a site that is about to get these labels: nobody makes a
// site, or labels one, so that it leaves their own part or comes into it
// without their having a say there.
func (p *part) mayMake(site fleet.Site) error {
	d := access.Allow(p.Principal, access.Change, access.Object{Kind: access.Site, Tenant: p.Tenant, Site: site.Name, Labels: site.SelectLabels()})
	return refused(d, func() error {
		return connect.NewError(connect.CodePermissionDenied, errors.New("site "+site.Name+" with these labels would be outside of your part of the tenant"))
	})
}

// filter keeps what the caller sees of a list.
func filter[T any](p *part, kind access.Kind, list []T, site func(T) string) ([]T, error) {
	if p.seesAll(kind) {
		return list, nil
	}
	var out []T
	for _, v := range list {
		sees, err := p.sees(kind, site(v))
		if err != nil {
			return nil, err
		}
		if sees {
			out = append(out, v)
		}
	}
	return out, nil
}

// page collects at most count+1 visible objects: next reads the following
// ones of the whole tenant after the last it gave, in pages.
func page[T any](p *part, kind access.Kind, count int, next func(after *T, count int) ([]T, error), site func(T) string) ([]T, error) {
	var out []T
	var after *T
	for {
		all, err := next(after, count+1)
		if err != nil {
			return nil, err
		}
		visible, err := filter(p, kind, all, site)
		if err != nil {
			return nil, err
		}
		if out = append(out, visible...); len(out) > count || len(all) <= count {
			return out[:min(len(out), count+1)], nil
		}
		after = &all[len(all)-1]
	}
}

// maxFiltered is how far a list that has no pages is searched for what a
// caller with a limited role sees.
const maxFiltered = 20000

// some collects at most count visible objects of a list without pages.
func some[T any](p *part, kind access.Kind, count int, first func(count int) ([]T, error), site func(T) string) ([]T, error) {
	if p.seesAll(kind) {
		return first(count)
	}
	all, err := first(maxFiltered)
	if err != nil {
		return nil, err
	}
	visible, err := filter(p, kind, all, site)
	return visible[:min(len(visible), count)], err
}

// eventSite is where an event happened: what names only a node is where that
// node is.
func (p *part) eventSite(e fleet.Event) (string, error) {
	if e.Site != "" || e.Node == "" || p.seesAll(access.Event) {
		return e.Site, nil
	}
	n, err := p.t.Node(p.Tenant, e.Node)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	return n.Site, err
}

// events keeps the events that the caller sees.
func (p *part) events(list []fleet.Event) ([]fleet.Event, error) {
	if p.seesAll(access.Event) {
		return list, nil
	}
	var out []fleet.Event
	for _, e := range list {
		site, err := p.eventSite(e)
		if err != nil {
			return nil, err
		}
		sees, err := p.sees(access.Event, site)
		if err != nil {
			return nil, err
		}
		if sees {
			out = append(out, e)
		}
	}
	return out, nil
}

// mayMachine allows what is done to a machine that is no node the caller sees:
// if it is a node of a site that they do not see, they may not.
func (p *part) mayMachine(r fleet.Request) error {
	n, err := p.t.Node(p.Tenant, r.Node)
	switch {
	case err == nil:
		return p.may(access.Node, access.Change, n.Site)
	case errors.Is(err, store.ErrNotFound):
		return p.may(access.Node, access.Change, r.Site)
	}
	return err
}
