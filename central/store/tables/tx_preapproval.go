package tables

import (
	"errors"
	"fmt"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func preApprovalOf(r db.Preapproval) (fleet.PreApproval, error) {
	var v fleet.PreApproval
	err := decode("pre-approval", r.Body, &v)
	v.Revision, v.Withdrawn = r.Revision, r.Withdrawn != 0
	return v, err
}

func (t *tx) PreApproval(tenant, name string) (fleet.PreApproval, error) {
	r, err := t.q.GetPreApproval(t.ctx, db.GetPreApprovalParams{Tenant: tenant, Name: name})
	if err != nil {
		return fleet.PreApproval{}, wrap("read", "pre-approval", err)
	}
	return preApprovalOf(r)
}

func (t *tx) PreApprovalByClaim(tenant string, hash fleet.HexBytes) (fleet.PreApproval, error) {
	r, err := t.q.GetPreApprovalByClaim(t.ctx, db.GetPreApprovalByClaimParams{Tenant: tenant, Claim: hash.String()})
	if err != nil {
		return fleet.PreApproval{}, wrap("read", "pre-approval", err)
	}
	return preApprovalOf(r)
}

func (t *tx) PreApprovals(tenant string) ([]fleet.PreApproval, error) {
	rows, err := t.q.ListPreApprovals(t.ctx, tenant)
	return list(rows, err, "pre-approvals", preApprovalOf)
}

func (t *tx) PreApprovalsOfKind(tenant string, kind fleet.PreApprovalKind) ([]fleet.PreApproval, error) {
	rows, err := t.q.ListPreApprovalsOfKind(t.ctx, db.ListPreApprovalsOfKindParams{Tenant: tenant, Kind: string(kind)})
	return list(rows, err, "pre-approvals", preApprovalOf)
}

func (t *tx) LinesOfEK(tenant string, ek fleet.EKHash) ([]store.ListLine, error) {
	rows, err := t.q.ListLinesOfEK(t.ctx, db.ListLinesOfEKParams{Tenant: tenant, Ek: ek.String()})
	return list(rows, err, "listed EKs", func(r db.ListedEk) (store.ListLine, error) {
		l := store.ListLine{PreApproval: r.Preapproval}
		err := decode("listed EK", r.Body, &l.ListedEK)
		l.Request = fleet.RequestID(r.Request)
		return l, err
	})
}

func (t *tx) CountLinesOfSite(tenant, preApproval, site string) (int, error) {
	n, err := t.q.CountLinesOfSite(t.ctx, db.CountLinesOfSiteParams{Tenant: tenant, Preapproval: preApproval, Pattern: `%"site":"` + site + `"%`})
	return int(n), wrap("count", "listed EKs", err)
}

func (t *tx) CountUses(tenant, preApproval string, after time.Time) (int, error) {
	n, err := t.q.CountPreApprovalUses(t.ctx, db.CountPreApprovalUsesParams{Tenant: tenant, Preapproval: preApproval, After: stamp(after)})
	return int(n), wrap("count", "uses", err)
}

func (t *tx) CountUsesOfNode(tenant string, node fleet.NodeID) (int, error) {
	n, err := t.q.CountPreApprovalUsesOfNode(t.ctx, db.CountPreApprovalUsesOfNodeParams{Tenant: tenant, Node: string(node)})
	return int(n), wrap("count", "uses", err)
}

func (t *tx) PutPreApproval(v fleet.PreApproval) (fleet.PreApproval, error) {
	seen, lines := v.Revision, v.EKs
	v.Revision++
	v.EKs = nil
	body, err := encode("pre-approval", v)
	if err != nil {
		return v, err
	}
	withdrawn := int64(0)
	if v.Withdrawn {
		withdrawn = 1
	}
	if seen != 0 {
		if len(lines) > 0 {
			return v, errors.New("tables: write pre-approval: the lines of a list cannot be changed")
		}
		n, err := t.q.UpdatePreApproval(t.ctx, db.UpdatePreApprovalParams{
			Tenant: v.Tenant, Name: v.Name, Kind: string(v.Kind), Claim: v.ClaimHash.String(), Withdrawn: withdrawn, Body: body, Seen: seen,
		})
		return v, replaced("pre-approval", n, err)
	}
	if err := t.q.InsertPreApproval(t.ctx, db.InsertPreApprovalParams{
		Tenant: v.Tenant, Name: v.Name, Kind: string(v.Kind), Claim: v.ClaimHash.String(), Withdrawn: withdrawn, Body: body,
	}); err != nil {
		return v, wrap("write", "pre-approval", err)
	}
	for _, e := range lines {
		request := e.Request
		e.Request = ""
		body, err := encode("listed EK", e)
		if err != nil {
			return v, err
		}
		if err := t.q.InsertListedEK(t.ctx, db.InsertListedEKParams{
			Tenant: v.Tenant, Ek: e.EK.String(), Preapproval: v.Name, Request: string(request), Body: body,
		}); err != nil {
			return v, wrap("write", "listed EK", err)
		}
	}
	return v, nil
}

func (t *tx) UsePreApproval(u store.Use) error {
	v, err := t.PreApproval(u.Tenant, u.PreApproval)
	if err != nil {
		return err
	}
	if v.Used >= v.Limit || v.Withdrawn {
		return fmt.Errorf("tables: use pre-approval %s: %w", v.Name, store.ErrConflict)
	}
	if v.Kind == fleet.PreApproveEKs {
		n, err := t.q.UseListedEK(t.ctx, db.UseListedEKParams{
			Tenant: u.Tenant, Ek: u.EK.String(), Preapproval: u.PreApproval, Request: string(u.Request),
		})
		if err := replaced("listed EK", n, err); err != nil {
			return err
		}
	}
	err = t.q.InsertPreApprovalUse(t.ctx, db.InsertPreApprovalUseParams{
		Tenant: u.Tenant, Preapproval: u.PreApproval, Node: string(u.EK.NodeID()), Request: string(u.Request), At: stamp(u.At),
	})
	if err := wrap("write", "use", err); err != nil {
		if errors.Is(err, store.ErrExists) {
			return fmt.Errorf("%w: %w", store.ErrConflict, err)
		}
		return err
	}
	v.Used++
	_, err = t.PutPreApproval(v)
	return err
}
