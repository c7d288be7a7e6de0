package central

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/drift"
	"github.com/muster-edge/muster/fleet/placement"
	"github.com/muster-edge/muster/fleet/statement"
)

// versionOf reads a stack version that was published: its signature was
// checked then.
func versionOf(v store.StackVersion) (out fleet.StackVersion, err error) {
	if err := said(v.Envelope, &out); err != nil {
		return out, fmt.Errorf("central: read stack version %s@%s: %w", v.Stack, v.Version, err)
	}
	return out, nil
}

// releaseKeys are the keys whose signature counts in the tenant.
func releaseKeys(t store.Reader, tenant string) ([]crypto.PublicKey, error) {
	stored, err := t.ReleaseKeys(tenant)
	if err != nil {
		return nil, err
	}
	if len(stored) == 0 {
		return nil, &enroll.Refused{Why: "the tenant trusts no release key yet", Do: "give it one: muster image register --release-pub FILE.pub, or muster serve --release-key FILE.pub"}
	}
	var keys []crypto.PublicKey
	for _, k := range stored {
		more, err := statement.ParseKeys([]byte(k.PEM))
		if err != nil {
			return nil, fmt.Errorf("central: read release key %s: %w", k.KeyID, err)
		}
		keys = append(keys, more...)
	}
	return keys, nil
}

// openVersion reads a stack version that one of the keys has signed.
func openVersion(envelope []byte, keys []crypto.PublicKey) (v fleet.StackVersion, keyID string, err error) {
	env, err := statement.Parse(envelope)
	if err != nil {
		return v, "", &enroll.Refused{Why: "this is no signed stack version: " + err.Error(), Do: "sign it: muster release stack FILE --key RELEASE.KEY"}
	}
	i, err := env.VerifiedBy(fleet.StackVersionPayload, keys)
	if err != nil {
		return v, "", &enroll.Refused{Why: "no release key that the tenant trusts has signed this stack version (" + err.Error() + ")", Do: "sign it with a known release key: muster release stack FILE --key RELEASE.KEY"}
	}
	d := json.NewDecoder(bytes.NewReader(env.Payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, "", &enroll.Refused{Why: "the stack version is not understood: " + err.Error(), Do: "it may be newer than this centre"}
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return v, "", &enroll.Refused{Why: "the stack version has data after its end"}
	}
	if err := v.Validate(); err != nil {
		return v, "", &enroll.Refused{Why: err.Error()}
	}
	keyID, err = statement.KeyID(keys[i])
	return v, keyID, err
}

// publish takes a signed stack version. Publishing it again changes nothing,
// also with another signature over the same words.
func (s *Server) publish(ctx context.Context, c caller, envelope []byte, reason string) (out store.StackVersion, created bool, warnings []string, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		out, created, warnings, err = s.publishIn(t, c.act(s.cfg.Now()), c.Tenant, envelope, reason)
		return err
	})
	if err == nil && created {
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return out, created, warnings, err
}

// publishIn is publish inside a transaction.
func (s *Server) publishIn(t store.Tx, by act, tenant string, envelope []byte, reason string) (out store.StackVersion, created bool, warnings []string, err error) {
	keys, err := releaseKeys(t, tenant)
	if err != nil {
		return out, created, warnings, err
	}
	v, keyID, err := openVersion(envelope, keys)
	if err != nil {
		return out, created, warnings, err
	}
	if v.Tenant != tenant {
		return out, created, warnings, &enroll.Refused{Why: fmt.Sprintf("stack version %s is of tenant %s, and this is tenant %s", v.ID(), v.Tenant, tenant)}
	}
	old, err := t.StackVersion(tenant, v.Stack, v.Version)
	switch {
	case err == nil:
		was, err := versionOf(old)
		if err != nil {
			return out, created, warnings, err
		}
		if !sameJSON(was, v) {
			return out, created, warnings, &enroll.Refused{Why: fmt.Sprintf("stack version %s is published and says something else", v.ID()), Do: "a version never changes: give it a new number"}
		}
		out = old
		return out, false, nil, nil
	case !errors.Is(err, store.ErrNotFound):
		return out, created, warnings, err
	}
	if _, err := t.Stack(tenant, v.Stack); errors.Is(err, store.ErrNotFound) {
		k := fleet.Stack{Meta: fleet.Meta{Tenant: tenant, Name: v.Stack, Generation: 1, Created: by.now, Updated: by.now}}
		if _, err := t.PutStack(k); err != nil {
			return out, created, warnings, err
		}
		if err := by.record(t, tenant, audit.StackCreated, "stack/"+v.Stack, nil, k, reason); err != nil {
			return out, created, warnings, err
		}
	} else if err != nil {
		return out, created, warnings, err
	}
	if warnings, err = s.lacking(t, v); err != nil {
		return out, created, warnings, err
	}
	sum := sha256.Sum256(envelope)
	out, created = store.StackVersion{
		Tenant: tenant, Stack: v.Stack, Version: v.Version, SHA256: sum[:], Published: by.now.UTC(), By: by.actor, KeyID: keyID, Envelope: envelope,
	}, true
	if err := t.AddStackVersion(out); err != nil {
		return out, created, warnings, err
	}
	if err := by.record(t, tenant, audit.StackVersionAdded, "stack/"+v.ID(), nil, v, reason); err != nil {
		return out, created, warnings, err
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{
		Tenant: tenant, Time: by.now, Kind: "stack.published", Text: fmt.Sprintf("stack version %s was published by %s", v.ID(), by.actor),
	}))
	return out, created, warnings, err
}

// lacking says which images and files of a version the centre does not have:
// nodes could not fetch them.
func (s *Server) lacking(t store.Reader, v fleet.StackVersion) (out []string, err error) {
	has := func(sum fleet.HexBytes, what string) error {
		_, err := t.Blob(v.Tenant, sum)
		if errors.Is(err, store.ErrNotFound) {
			out = append(out, what)
			return nil
		}
		return err
	}
	for _, ref := range v.Images {
		image, err := t.ImageBySHA256(v.Tenant, ref.SHA256)
		if errors.Is(err, store.ErrNotFound) {
			out = append(out, fmt.Sprintf("image %s for %s is not here: muster image push", ref.ID(), ref.Arch))
			continue
		}
		if err != nil {
			return nil, err
		}
		more, err := s.imageLacks(t, image)
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	for _, a := range charts(v) {
		if err := has(a.SHA256, fmt.Sprintf("chart %s %s is not here: muster stack publish FILE --charts DIR", a.Name, a.Version)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// imageLacks names the files of a registered slot image that are not here.
func (s *Server) imageLacks(t store.Reader, image fleet.Image) (out []string, err error) {
	if image.Kind != fleet.ImageSlot {
		return []string{fmt.Sprintf("image %s is a %s image, and only slot images are installed", image.ID(), image.Kind)}, nil
	}
	m, err := manifestOf(image)
	if err != nil {
		return nil, err
	}
	for _, f := range m.Files() {
		if _, err := t.Blob(image.Tenant, f.SHA256[:]); errors.Is(err, store.ErrNotFound) {
			out = append(out, fmt.Sprintf("file %s of image %s is not here: muster image push", f.File, image.ID()))
		} else if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// assignment of a stack version to sites.
type stackAssignment struct {
	sites          []string
	labels         map[string]string
	stack, version string
	reason         string
	generation     int64
	dry, noReturn  bool
}

// assignedSite is what became of one site.
type assignedSite struct {
	site    fleet.Site
	before  string
	changed bool
	refused string
}

// assignBatch is how many sites one transaction changes.
const assignBatch = 100

// assignStack gives sites a stack version. Each batch of sites is one
// transaction: what was reported as changed is so, whatever comes after.
func (s *Server) assignStack(ctx context.Context, c caller, q stackAssignment) (out []assignedSite, warnings []string, err error) {
	var version *fleet.StackVersion
	var ref *fleet.StackRef
	names := slices.Clone(q.sites)
	err = s.store.View(ctx, func(t store.Reader) error {
		if q.stack != "" {
			v, r, err := s.assignableVersion(t, c.Tenant, q.stack, q.version)
			if err != nil {
				return err
			}
			version, ref = &v, &r
		}
		if len(q.labels) == 0 {
			return nil
		}
		look := c.part(t)
		return eachSite(t, c.Tenant, func(site fleet.Site) error {
			if !placement.Fits(q.labels, site.Labels) {
				return nil
			}
			sees, err := look.sees(access.Site, site.Name)
			if sees {
				names = append(names, site.Name)
			}
			return err
		})
	})
	if err != nil {
		return nil, nil, err
	}
	if len(names) == 0 {
		return nil, nil, &enroll.Refused{Why: "no site has these labels", Do: "`muster get sites -o wide` lists them"}
	}
	for batch := range slices.Chunk(names, assignBatch) {
		var done []assignedSite
		err := s.store.Update(ctx, func(t store.Tx) error {
			done = nil
			by := c.act(s.cfg.Now())
			for _, name := range batch {
				one, err := s.assignOne(t, by, c, name, version, ref, q)
				if err != nil {
					return err
				}
				done = append(done, one)
			}
			if q.dry {
				return errDry
			}
			return nil
		})
		if err != nil && !errors.Is(err, errDry) {
			return out, warnings, err
		}
		out = append(out, done...)
		s.hub.changed(eventsTopic(c.Tenant))
		for _, one := range done {
			if one.changed && !q.dry {
				s.installs(ctx, c.Tenant, one.site.Name)
			}
		}
	}
	return out, warnings, nil
}

// assignableVersion finds a version that nodes can fetch as a whole.
func (s *Server) assignableVersion(t store.Reader, tenant, stack, version string) (v fleet.StackVersion, ref fleet.StackRef, err error) {
	kept, err := t.StackVersion(tenant, stack, version)
	if errors.Is(err, store.ErrNotFound) {
		return v, ref, &errNoSuch{fmt.Sprintf("there is no stack version %.80s@%.80s in tenant %s", stack, version, tenant), "`muster get stacks` lists them"}
	}
	if err != nil {
		return v, ref, err
	}
	if v, err = versionOf(kept); err != nil {
		return v, ref, err
	}
	lacks, err := s.lacking(t, v)
	if err != nil {
		return v, ref, err
	}
	if len(lacks) > 0 {
		return v, ref, &enroll.Refused{Why: fmt.Sprintf("stack version %s could not be fetched by any node: %s", v.ID(), strings.Join(lacks, "; "))}
	}
	return v, fleet.StackRef{Name: v.Stack, Version: v.Version, SHA256: kept.SHA256}, nil
}

// assignOne changes one site. What a person has to know about one site of many
// is its refusal; with one site it is the error.
func (s *Server) assignOne(t store.Tx, by act, c caller, name string, v *fleet.StackVersion, ref *fleet.StackRef, q stackAssignment) (assignedSite, error) {
	tenant, look := c.Tenant, c.part(t)
	site, err := look.findSite(name)
	if err != nil {
		return assignedSite{}, err
	}
	if err := look.may(access.Site, access.Change, name); err != nil {
		return assignedSite{}, err
	}
	out := assignedSite{site: site}
	if old := site.Spec.StackRef(); old != nil {
		out.before = old.ID()
	}
	if q.generation != 0 && q.generation != site.Generation {
		return out, fmt.Errorf("%w: site %s is at generation %d", store.ErrConflict, name, site.Generation)
	}
	if why, err := s.assignable(t, site, v, q.noReturn); err != nil || why != nil {
		if why != nil && len(q.sites) == 1 && len(q.labels) == 0 {
			return out, why
		}
		if why != nil {
			out.refused = why.Error()
		}
		return out, err
	}
	before := stackForAudit(site)
	site.Spec.Stack, site.Spec.Version, site.Spec.StackSHA256 = "", "", nil
	if ref != nil {
		site.Spec.Stack, site.Spec.Version, site.Spec.StackSHA256 = ref.Name, ref.Version, ref.SHA256
	}
	if out.changed = !sameJSON(before, stackForAudit(site)); !out.changed {
		return out, nil
	}
	site.Generation++
	site.Updated = by.now
	if err := site.Validate(); err != nil {
		return out, &enroll.Refused{Why: err.Error()}
	}
	if _, _, _, err := s.scribe.charter(t, by, &site, q.reason); err != nil {
		return out, err
	}
	if out.site, err = t.PutSite(site); err != nil {
		return out, err
	}
	if err := by.record(t, tenant, audit.SiteChanged, "site/"+name, before, stackForAudit(site), q.reason); err != nil {
		return out, err
	}
	return out, stackEvent(t, by, out.site)
}

// stackEvent tells that a site shall run something else.
func stackEvent(t store.Tx, by act, site fleet.Site) error {
	words := fmt.Sprintf("site %s shall run nothing in particular (%s)", site.Name, by.actor)
	if ref := site.Spec.StackRef(); ref != nil {
		words = fmt.Sprintf("site %s shall run %s (%s)", site.Name, ref.ID(), by.actor)
	}
	_, err := t.AddEvent(cleanEvent(fleet.Event{Tenant: site.Tenant, Time: by.now, Kind: "site.stack", Site: site.Name, Text: words}))
	return err
}

func stackForAudit(s fleet.Site) any {
	return map[string]any{"stack": s.Spec.Stack, "version": s.Spec.Version, "stack_sha256": s.Spec.StackSHA256}
}

// assignable says why a site cannot go to a version, nil if it can.
func (s *Server) assignable(t store.Reader, site fleet.Site, v *fleet.StackVersion, noReturn bool) (error, error) {
	if v == nil {
		return nil, nil
	}
	if chosen := site.Spec.Chosen().Images; len(chosen) > 0 {
		for _, i := range v.Images {
			if !slices.Contains(chosen, i.ID()) {
				return &enroll.Refused{
					Why: fmt.Sprintf("site %s allows only %s, and the version needs image %s", site.Name, strings.Join(chosen, ", "), i.ID()),
					Do:  fmt.Sprintf("muster site set %s --image all, or name the image too", site.Name),
				}, nil
			}
		}
	}
	old := site.Spec.StackRef()
	if old == nil {
		return nil, nil
	}
	kept, err := t.StackVersion(site.Tenant, old.Name, old.Version)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	was, err := versionOf(kept)
	if err != nil {
		return nil, err
	}
	switch step := compareMinor(v.EtcdMinor, was.EtcdMinor); {
	case step < 0:
		return &enroll.Refused{
			Why: fmt.Sprintf("site %s runs etcd %s (%s), and %s has etcd %s: etcd does not go back", site.Name, was.EtcdMinor, was.ID(), v.ID(), v.EtcdMinor),
			Do:  "the way back is a snapshot from before the step: muster order restore",
		}, nil
	case step > 0 && !noReturn:
		return &enroll.Refused{
			Why: fmt.Sprintf("the step from %s to %s takes etcd from %s to %s at site %s: this is a point of no return", was.ID(), v.ID(), was.EtcdMinor, v.EtcdMinor, site.Name),
			Do:  "try it at one site first, and then: --accept-no-return",
		}, nil
	}
	return nil, nil
}

// compareMinor compares "3.5" and "3.6" as numbers.
func compareMinor(a, b string) int {
	read := func(s string) (n [2]int) {
		major, minor, _ := strings.Cut(s, ".")
		// Both were validated when the version was published.
		n[0], _ = strconv.Atoi(major)
		n[1], _ = strconv.Atoi(minor)
		return n
	}
	x, y := read(a), read(b)
	return slices.Compare(x[:], y[:])
}

// driftOf compares one site. images are remembered for many sites.
func (s *Server) driftOf(t store.Reader, site fleet.Site, images map[string][]fleet.ImageRef) (drift.Result, error) {
	in := drift.Input{Site: site}
	if ref := site.Spec.StackRef(); ref != nil {
		refs, there := images[ref.ID()]
		if !there {
			kept, err := t.StackVersion(site.Tenant, ref.Name, ref.Version)
			if err == nil {
				v, err := versionOf(kept)
				if err != nil {
					return drift.Result{}, err
				}
				refs = v.Images
			} else if !errors.Is(err, store.ErrNotFound) {
				return drift.Result{}, err
			}
			images[ref.ID()] = refs
		}
		in.Images = refs
		systems, err := t.SystemsOfSite(site.Tenant, site.Name)
		if err != nil {
			return drift.Result{}, err
		}
		said := make(map[fleet.NodeID]fleet.SystemReport, len(systems))
		for _, r := range systems {
			said[r.Node] = r
		}
		err = eachNodeOf(t, site.Tenant, site.Name, func(n fleet.Node) error {
			if n.Admitted() && n.State != fleet.NodeDenied {
				in.Nodes = append(in.Nodes, drift.Node{ID: n.ID, Words: n.Words, LastSeen: s.seen.latest(n), System: said[n.ID]})
			}
			return nil
		})
		if err != nil {
			return drift.Result{}, err
		}
	}
	return drift.Compare(s.cfg.Now(), s.staleAfter(), in), nil
}

func (s *Server) staleAfter() time.Duration { return staleReports * s.cfg.ReportEvery }

// latest is when the node called, also where that is not written yet.
func (l *lastSeen) latest(n fleet.Node) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if at := l.seen[n.ID].at; at.After(n.LastSeen) {
		return at
	}
	return n.LastSeen
}
