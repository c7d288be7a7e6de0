package central

import (
	"context"
	"crypto/rand"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/text"
)

// preApprovalOf is what claims, rules and lists have in common, unchecked:
// Validate is asked where it is written.
func preApprovalOf(c caller, name, site string, labels map[string]string) fleet.PreApproval {
	return fleet.PreApproval{Meta: fleet.Meta{Tenant: c.Tenant, Name: name}, Site: site, NodeLabels: labels}
}

func siteWanted(site string) error {
	if site == "" {
		return invalid("which site? A claim code or a rule belongs to one")
	}
	if err := fleet.ValidateName("site", site); err != nil {
		return invalid("%v", err)
	}
	return nil
}

// ImportPreApproval implements the management service.
func (s management) ImportPreApproval(ctx context.Context, q *musterv1.ImportPreApprovalRequest) (*musterv1.ImportPreApprovalResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if q.Site != "" {
		if err := fleet.ValidateName("site", q.Site); err != nil {
			return nil, invalid("%v", err)
		}
	}
	c := callerOf(ctx)
	p := preApprovalOf(c, nameOr(q.Name, "list"), q.Site, q.Labels)
	if p.NotAfter, err = endOf(s.cfg.Now(), q.ExpiresSeconds, preApprovalLife); err != nil {
		return nil, err
	}
	done, err := s.importList(ctx, c, listImport{PreApproval: p, csv: q.Csv, createSites: q.CreateSites, dryRun: q.DryRun, reason: reason})
	if err != nil {
		return nil, s.coded(ctx, "importing the list", err)
	}
	out := &musterv1.ImportPreApprovalResponse{Lines: uint32(len(done.list.EKs)), SitesCreated: done.sites, MoreProblems: uint32(done.list.More)}
	for _, x := range done.list.Problems {
		out.Problems = append(out.Problems, &musterv1.LineProblem{Line: uint32(x.Line), Problem: text.Clean(x.Why, 512)})
	}
	if len(out.Problems) == 0 {
		out.PreApproval = api.PreApprovalToProto(done.p)
	}
	return out, nil
}

// CreateClaim implements the management service.
func (s management) CreateClaim(ctx context.Context, q *musterv1.CreateClaimRequest) (*musterv1.CreateClaimResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if err := siteWanted(q.Site); err != nil {
		return nil, err
	}
	code, hash, err := enroll.NewClaim(rand.Reader)
	if err != nil {
		return nil, s.coded(ctx, "making the claim code", err)
	}
	c := callerOf(ctx)
	p := preApprovalOf(c, nameOr(q.Name, "claim"), q.Site, q.Labels)
	p.Kind, p.ClaimHash, p.Limit = fleet.PreApproveClaim, hash, 1
	if p.NotAfter, err = endOf(s.cfg.Now(), q.ExpiresSeconds, claimLife); err != nil {
		return nil, err
	}
	if p, err = s.createPreApproval(ctx, c, p, reason); err != nil {
		return nil, s.coded(ctx, "making the claim code", err)
	}
	return &musterv1.CreateClaimResponse{PreApproval: api.PreApprovalToProto(p), Code: code}, nil
}

// CreateRule implements the management service.
func (s management) CreateRule(ctx context.Context, q *musterv1.CreateRuleRequest) (*musterv1.CreateRuleResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	if err := siteWanted(q.Site); err != nil {
		return nil, err
	}
	c := callerOf(ctx)
	// The enumerations have a conversion in api alone.
	p, err := api.PreApprovalFromProto(&musterv1.PreApproval{
		Kind: string(fleet.PreApproveRule), MinIdentity: q.MinIdentity, MinBoot: q.MinBoot,
		Limit: int64(q.Max), PerDay: int64(q.PerDay), Vendor: q.Vendor, Serials: q.Serials,
	})
	if err != nil {
		return nil, invalid("%v", err)
	}
	common := preApprovalOf(c, nameOr(q.Name, "rule"), q.Site, q.Labels)
	p.Meta, p.Site, p.NodeLabels = common.Meta, common.Site, common.NodeLabels
	if p.NotAfter, err = endOf(s.cfg.Now(), q.ExpiresSeconds, preApprovalLife); err != nil {
		return nil, err
	}
	if p, err = s.createPreApproval(ctx, c, p, reason); err != nil {
		return nil, s.coded(ctx, "making the rule", err)
	}
	return &musterv1.CreateRuleResponse{PreApproval: api.PreApprovalToProto(p)}, nil
}

// ListPreApprovals implements the management service.
func (s management) ListPreApprovals(ctx context.Context, _ *musterv1.ListPreApprovalsRequest) (*musterv1.ListPreApprovalsResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListPreApprovalsResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		all, err := t.PreApprovals(c.Tenant)
		if err != nil {
			return err
		}
		all, err = filter(c.part(t), access.PreApproval, all, func(p fleet.PreApproval) string { return p.Site })
		for _, p := range all {
			out.PreApprovals = append(out.PreApprovals, api.PreApprovalToProto(p))
		}
		return err
	})
	return out, s.coded(ctx, "listing pre-approvals", err)
}

// RemovePreApproval implements the management service.
func (s management) RemovePreApproval(ctx context.Context, q *musterv1.RemovePreApprovalRequest) (*musterv1.RemovePreApprovalResponse, error) {
	reason, err := reasonOf(q.Reason, false)
	if err != nil {
		return nil, err
	}
	p, err := s.removePreApproval(ctx, callerOf(ctx), q.Name, reason)
	if err != nil {
		return nil, s.coded(ctx, "removing the pre-approval", err)
	}
	return &musterv1.RemovePreApprovalResponse{PreApproval: api.PreApprovalToProto(p)}, nil
}

// TestPreApprovals implements the management service.
func (s management) TestPreApprovals(ctx context.Context, q *musterv1.TestPreApprovalsRequest) (*musterv1.TestPreApprovalsResponse, error) {
	r, o, err := s.testPreApprovals(ctx, callerOf(ctx), q.Id)
	if err != nil {
		return nil, s.coded(ctx, "testing pre-approvals", err)
	}
	out := &musterv1.TestPreApprovalsResponse{
		Request: string(r.ID), Approve: o.Approve, Which: o.Which, Reason: text.Clean(o.Reason, 512), Site: o.Site, Labels: o.Labels,
	}
	for _, x := range o.Tried {
		out.Tried = append(out.Tried, &musterv1.TriedPreApproval{Name: x.ID, Kind: string(x.Kind), WhyNot: text.Clean(x.Why, 512)})
	}
	return out, nil
}
