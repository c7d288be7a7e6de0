package service

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// Renew gives the node a new certificate for the key it has, or the last one
// while that is fresh. The caller has authenticated the node by that key on
// this connection; the handler must stand behind Service.Node.
//
// The machine is judged by the policy of this moment, as if it enrolled: keys,
// quote, event log, EK chain. What differs from an enrollment: no credential
// is activated, since EK and AK must be those that were proved to belong
// together, and there is no ticket. Evidence that has changed, and a TPM
// clock that went backwards, are filed like any machine's and get nothing.
func (s *Service) Renew(ctx context.Context, node fleet.NodeID, m *musterv1.RenewRequest) (_ *musterv1.RenewResponse, err error) {
	defer func(start time.Time) { s.observe(CallRenew, start, err) }(time.Now())
	c := connectionOf(ctx)
	if !c.bound {
		return nil, fail(connect.CodeFailedPrecondition, "tls", "use TLS 1.3, straight to the centre")
	}
	begin, proof := m.GetKeys(), m.GetProof()
	if begin.GetProtocol() != Protocol {
		return nil, fail(connect.CodeFailedPrecondition, "protocol",
			fmt.Sprintf("the centre speaks version %d; boot a current recovery image", Protocol))
	}
	if err := errors.Join(capBegin(begin), capComplete(proof)); err != nil {
		return nil, fail(connect.CodeInvalidArgument, "bad-request", err.Error())
	}
	var out enroll.Issued
	err = s.completes.do(ctx, func() (err error) {
		out, err = s.renew(ctx, c, node, begin, proof)
		return err
	})
	if err != nil {
		return nil, s.pooled("renew", err)
	}
	return &musterv1.RenewResponse{Certificates: out.Certificates, Documents: out.Documents, Now: timestamppb.New(s.cfg.Now())}, nil
}

func (s *Service) renew(ctx context.Context, c connection, node fleet.NodeID, begin *musterv1.BeginRequest, m *musterv1.CompleteRequest) (enroll.Issued, error) {
	var none enroll.Issued
	keys, err := parseKeys(begin)
	if err != nil {
		return none, fail(connect.CodeInvalidArgument, "bad-request", "the TPM's public areas cannot be used")
	}
	now := s.cfg.Now()
	p, err := s.judge(ctx, c, begin, keys, m, enroll.RenewalTranscript(enroll.TranscriptFields{
		EK: keys.ekDER, AK: keys.ak.Raw, LDevID: keys.ldevid.Raw, CSR: m.GetCsr(), Hardware: m.GetHardware(), Exporter: c.exporter[:],
	}), now)
	if err != nil {
		return none, err
	}
	if p.filing.Evidence.EK.NodeID() != node {
		return none, s.refuse(c, "ek", fmt.Errorf("service: renew: node %s shows the EK of node %s", node, p.filing.Evidence.EK.NodeID()))
	}
	// Nobody activated a credential here: without that, the EK is a mere
	// claim, unless both keys are those of the request in force. Filing
	// anything else would let a node speak for a machine that it is not.
	id := fleet.RequestIDOf(enroll.EvidenceDigest(p.filing.Evidence))
	held, err := s.cfg.Store.Live(ctx, s.cfg.Tenant, node)
	switch {
	case errors.Is(err, ErrNotFound):
		return none, s.changed(c, node, "there is no request in force")
	case err != nil:
		return none, fmt.Errorf("service: renew: %w", err)
	case held.Evidence.EK != p.filing.Evidence.EK || string(held.Evidence.AKName) != string(p.filing.Evidence.AKName) ||
		string(held.Evidence.LDevIDKey) != string(p.filing.Evidence.LDevIDKey):
		return none, s.changed(c, node, "other keys than those that were approved")
	}
	p.filing.Begun = c.opened
	request, err := s.file(ctx, c, p)
	if err != nil {
		return none, err
	}
	if request.ID != id || request.State != fleet.RequestIssued {
		return none, s.changed(c, node, fmt.Sprintf("request %s is %s", request.ID, request.State))
	}
	public, err := x509.ParsePKIXPublicKey(p.key)
	key, ok := public.(*ecdsa.PublicKey)
	if err != nil || !ok {
		return none, fmt.Errorf("service: renew: LDevID key: %T, %w", public, err)
	}
	out, err := s.issue(ctx, ticket{request: request.ID, tenant: request.Tenant}, request, key)
	var refused *enroll.Refused
	switch {
	case errors.Is(err, enroll.ErrNotApproved):
		return none, s.changed(c, node, err.Error())
	case errors.Is(err, enroll.ErrDenied):
		return none, s.denied(c, request.Evidence.EK)
	case errors.As(err, &refused):
		return none, s.notAllowed(c, request, refused)
	case err != nil:
		return none, err
	}
	s.cfg.Log.Info("certificate renewed", slog.String(keyNode, string(node)), slog.String(keyRequest, string(request.ID)))
	return out, nil
}

// changed sends the node to enrollment, where people see what has changed.
func (s *Service) changed(c connection, node fleet.NodeID, why string) error {
	s.cfg.Log.Warn("not renewed", slog.String(keySource, c.source.String()), slog.String(keyNode, string(node)), slog.String(keyWhy, why))
	return fail(connect.CodeFailedPrecondition, "changed", "this machine is not what was approved any more; enroll again")
}
