package central

import (
	"context"
	"errors"
	"slices"
	"strings"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/declare"
)

// maxApplied bounds the documents of one call, exportPage those of one answer.
const (
	maxApplied = 1000
	exportPage = 200
)

// Apply implements the management service.
func (s management) Apply(ctx context.Context, q *musterv1.ApplyRequest) (*musterv1.ApplyResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if len(q.Documents) == 0 || len(q.Documents) > maxApplied {
		return nil, invalid("%d documents; want 1 to %d in one call", len(q.Documents), maxApplied)
	}
	done, problems, more, err := s.apply(ctx, callerOf(ctx), applying{docs: q.Documents, dry: q.DryRun, noReturn: q.AcceptNoReturn, reason: reason})
	if err != nil {
		return nil, s.coded(ctx, "applying documents", err)
	}
	out := &musterv1.ApplyResponse{MoreProblems: more}
	for _, d := range done {
		out.Objects = append(out.Objects, &musterv1.AppliedObject{
			Document: uint32(d.index), Kind: string(d.doc.Kind), Name: d.doc.Metadata.Name, Outcome: d.outcome, Generation: d.generation,
			Before: d.before, After: d.after, Notes: d.notes,
		})
	}
	for _, p := range problems {
		out.Problems = append(out.Problems, &musterv1.ApplyProblem{Document: uint32(p.index), Path: p.Path, Problem: p.Text, Conflict: p.conflict})
	}
	return out, nil
}

// Export implements the management service.
func (s management) Export(ctx context.Context, q *musterv1.ExportRequest) (*musterv1.ExportResponse, error) {
	kinds := []declare.Kind{declare.Stack, declare.Site, declare.PreApprovalRule}
	if q.Kind != "" {
		k, err := declare.KindOf(q.Kind)
		if err != nil {
			return nil, invalid("%s", strings.TrimPrefix(err.Error(), "declare: "))
		}
		kinds = []declare.Kind{k}
	} else if q.Name != "" || q.After != "" {
		return nil, invalid("a name wants its kind")
	}
	c := callerOf(ctx)
	out := &musterv1.ExportResponse{}
	err := s.store.View(ctx, func(t store.Reader) error {
		out.Documents, out.More = nil, false
		look := c.part(t)
		for _, k := range kinds {
			docs, more, err := look.export(k, q.Name, q.After, q.Kind == "")
			if err != nil {
				return err
			}
			out.Documents, out.More = append(out.Documents, docs...), more
		}
		return nil
	})
	return out, s.coded(ctx, "exporting", err)
}

// export writes what the caller sees of one kind: one object, or a page. With
// all there are no pages.
func (p *part) export(k declare.Kind, name, after string, all bool) (docs [][]byte, more bool, err error) {
	add := func(b []byte, err error) error {
		docs = append(docs, b)
		return err
	}
	switch k {
	case declare.Site:
		if name != "" {
			site, err := p.findSite(name)
			if err != nil {
				return nil, false, err
			}
			return docs, false, errors.Join(add(siteDocument(site)), nil)
		}
		err := eachSite(p.t, p.Tenant, func(site fleet.Site) error {
			if more = len(docs) >= exportPage && !all; more || site.Name <= after {
				return nil
			}
			if sees, err := p.sees(access.Site, site.Name); err != nil || !sees {
				return err
			}
			return add(siteDocument(site))
		})
		return docs, more, err
	case declare.Stack:
		if err := p.may(access.Stack, access.Read, ""); err != nil {
			return nil, false, err
		}
		if name != "" {
			stack, err := findStack(p.t, p.Tenant, name)
			if err != nil {
				return nil, false, err
			}
			return docs, false, add(stackDocument(stack))
		}
		stacks, err := p.t.Stacks(p.Tenant)
		for _, v := range stacks {
			err = errors.Join(err, add(stackDocument(v)))
		}
		return docs, false, err
	case declare.StackVersion:
		return p.exportVersions(name)
	case declare.PreApprovalRule:
		rules, err := p.t.PreApprovalsOfKind(p.Tenant, fleet.PreApproveRule)
		if err != nil {
			return nil, false, err
		}
		rules, err = filter(p, access.PreApproval, rules, func(r fleet.PreApproval) string { return r.Site })
		for _, r := range rules {
			if name == "" || r.Name == name {
				err = errors.Join(err, add(ruleDocument(r)))
			}
		}
		if err == nil && name != "" && len(docs) == 0 {
			err = &errNoSuch{"there is no rule " + name, "`muster preapprove list` names them"}
		}
		return docs, false, err
	}
	return p.exportAssignments(name, after)
}

func (p *part) exportVersions(name string) (docs [][]byte, more bool, err error) {
	if err := p.may(access.Stack, access.Read, ""); err != nil {
		return nil, false, err
	}
	stacks, err := p.t.Stacks(p.Tenant)
	if err != nil {
		return nil, false, err
	}
	for _, k := range stacks {
		versions, err := p.t.StackVersions(p.Tenant, k.Name)
		if err != nil {
			return nil, false, err
		}
		for _, v := range slices.Backward(versions) {
			id := v.Stack + "@" + v.Version
			if name != "" && id != name {
				continue
			}
			b, err := declare.Write(declare.StackVersion, declare.Metadata{Name: id}, declare.StackVersionSpec{Envelope: v.Envelope})
			if err != nil {
				return nil, false, err
			}
			docs = append(docs, b)
		}
	}
	if name != "" && len(docs) == 0 {
		return nil, false, &errNoSuch{"there is no stack version " + name, "`muster get stacks` lists them"}
	}
	return docs, false, nil
}

func (p *part) exportAssignments(name, after string) (docs [][]byte, more bool, err error) {
	if name != "" {
		n, err := p.findNode(name)
		if err == nil && !n.Admitted() {
			err = &errNoSuch{"node " + string(n.ID) + " belongs to no site", "muster assign gives it one"}
		}
		if err != nil {
			return nil, false, err
		}
		b, err := assignmentDocument(n)
		return [][]byte{b}, false, err
	}
	nodes, err := page(p, access.Node, exportPage, func(last *fleet.Node, count int) ([]fleet.Node, error) {
		from := fleet.NodeID(after)
		if last != nil {
			from = last.ID
		}
		return p.t.Nodes(p.Tenant, from, count)
	}, func(n fleet.Node) string { return n.Site })
	if err != nil {
		return nil, false, err
	}
	for _, n := range nodes[:min(len(nodes), exportPage)] {
		if !n.Admitted() {
			continue
		}
		b, err := assignmentDocument(n)
		if err != nil {
			return nil, false, err
		}
		docs = append(docs, b)
	}
	// Without a document the caller could not ask for the next page; a page of
	// the pool alone is rare enough to be read whole.
	if len(nodes) > exportPage && len(docs) == 0 {
		return p.exportAssignments("", string(nodes[exportPage-1].ID))
	}
	return docs, len(nodes) > exportPage, nil
}

// DeleteObject implements the management service.
func (s management) DeleteObject(ctx context.Context, q *musterv1.DeleteObjectRequest) (*musterv1.DeleteObjectResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	notes, err := s.deleteObject(ctx, callerOf(ctx), deletion{
		kind: q.Kind, name: q.Name, reason: reason, generation: q.Generation, dry: q.DryRun, withEscrow: q.WithEscrow,
	})
	if err != nil {
		return nil, s.coded(ctx, "deleting", err)
	}
	return &musterv1.DeleteObjectResponse{Notes: notes}, nil
}
