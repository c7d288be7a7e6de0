package central

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
)

var errLater = connect.NewError(connect.CodeUnimplemented, errors.New("not yet"))

// ImportPreApproval implements the management service.
func (s management) ImportPreApproval(ctx context.Context, q *musterv1.ImportPreApprovalRequest) (*musterv1.ImportPreApprovalResponse, error) {
	return nil, errLater
}

// CreateClaim implements the management service.
func (s management) CreateClaim(ctx context.Context, q *musterv1.CreateClaimRequest) (*musterv1.CreateClaimResponse, error) {
	return nil, errLater
}

// CreateRule implements the management service.
func (s management) CreateRule(ctx context.Context, q *musterv1.CreateRuleRequest) (*musterv1.CreateRuleResponse, error) {
	return nil, errLater
}

// ListPreApprovals implements the management service.
func (s management) ListPreApprovals(ctx context.Context, _ *musterv1.ListPreApprovalsRequest) (*musterv1.ListPreApprovalsResponse, error) {
	return nil, errLater
}

// RemovePreApproval implements the management service.
func (s management) RemovePreApproval(ctx context.Context, q *musterv1.RemovePreApprovalRequest) (*musterv1.RemovePreApprovalResponse, error) {
	return nil, errLater
}

// TestPreApprovals implements the management service.
func (s management) TestPreApprovals(ctx context.Context, q *musterv1.TestPreApprovalsRequest) (*musterv1.TestPreApprovalsResponse, error) {
	return nil, errLater
}
