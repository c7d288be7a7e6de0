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
	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/pki"
)

// maxWait is the longest long poll.
const maxWait = 30 * time.Second

// Collect implements the RPC.
func (s *Service) Collect(ctx context.Context, m *musterv1.CollectRequest) (_ *musterv1.CollectResponse, err error) {
	defer func(start time.Time) { s.observe(CallCollect, start, err) }(time.Now())
	now := s.cfg.Now()
	t, key, err := s.openTicket(ctx, m.GetTicket(), now)
	if err != nil {
		return nil, err
	}
	wait := min(time.Duration(m.GetWaitSeconds())*time.Second, maxWait)
	r, err := s.await(ctx, t, wait)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, noTicket()
	case err != nil:
		return nil, s.pooled("collect", err)
	}
	if hash, err := enroll.KeyHash(key); err != nil || hash.String() != r.Evidence.LDevIDKey.String() {
		return nil, noTicket()
	}
	out := &musterv1.CollectResponse{State: r.State.String(), Message: enroll.Message(r), Now: timestamppb.New(s.cfg.Now())}
	switch r.State {
	case fleet.RequestApproved, fleet.RequestIssued:
	case fleet.RequestPending, fleet.RequestQuarantined:
		out.RetryAfterSeconds = 1
		if wait == 0 {
			out.RetryAfterSeconds = uint32(maxWait / time.Second)
		}
		return out, nil
	case fleet.RequestRejected:
		out.RetryAfterSeconds = 900
		return out, nil
	default:
		out.RetryAfterSeconds = 1
		return out, nil
	}
	var (
		issued  enroll.Issued
		refused *enroll.Refused
	)
	err = s.completes.do(ctx, func() (err error) {
		issued, err = s.issue(ctx, t, r, key)
		return err
	})
	switch {
	case errors.Is(err, enroll.ErrNotApproved):
		// Decided otherwise in the meantime: the next call will see it.
		out.State, out.Message, out.RetryAfterSeconds = fleet.RequestPending.String(), "", 1
		return out, nil
	case errors.Is(err, enroll.ErrDenied):
		return nil, s.denied(connectionOf(ctx), r.Evidence.EK)
	case errors.As(err, &refused):
		return nil, s.notAllowed(connectionOf(ctx), r, refused)
	case err != nil:
		return nil, s.pooled("collect", err)
	}
	out.State = fleet.RequestIssued.String()
	out.Message = enroll.Message(fleet.Request{State: fleet.RequestIssued})
	out.Certificates, out.Documents = issued.Certificates, issued.Documents
	s.cfg.Log.Info("certificate collected", slog.String(keyRequest, string(r.ID)), slog.String(keyNode, string(r.Node)))
	return out, nil
}

// notAllowed turns away an enrolled machine whose new certificate today's
// policy does not allow.
func (s *Service) notAllowed(c connection, r fleet.Request, why *enroll.Refused) error {
	s.cfg.Log.Warn("no new certificate", slog.String(keySource, c.source.String()), slog.String(keyRequest, string(r.ID)),
		slog.String(keyNode, string(r.Node)), slog.Any(keyError, why))
	e := fail(connect.CodePermissionDenied, "not-allowed", "today's policy does not allow what this machine is; ask your operator")
	e.Meta().Set("Retry-After", "900")
	return e
}

func noTicket() *connect.Error {
	return fail(connect.CodeNotFound, "not-found", "there is no such request, or the ticket has run out; begin again")
}

func (s *Service) openTicket(ctx context.Context, sealed []byte, now time.Time) (ticket, *ecdsa.PublicKey, error) {
	if len(sealed) > maxTicket {
		return ticket{}, nil, noTicket()
	}
	keys, err := s.cfg.Keys(ctx, now)
	if err != nil {
		return ticket{}, nil, s.fault("collect", fmt.Errorf("sealing keys: %w", err))
	}
	plain, err := open(keys, ticketDomain, sealed)
	if err != nil {
		return ticket{}, nil, noTicket()
	}
	t, err := decodeTicket(plain)
	if err != nil || !now.Before(t.expires) || t.tenant != s.cfg.Tenant {
		return ticket{}, nil, noTicket()
	}
	public, err := x509.ParsePKIXPublicKey(t.key)
	key, ok := public.(*ecdsa.PublicKey)
	if err != nil || !ok {
		return ticket{}, nil, noTicket()
	}
	return t, key, nil
}

// await returns the request, at the latest after wait, and at once if there
// is nothing to wait for.
func (s *Service) await(ctx context.Context, t ticket, wait time.Duration) (fleet.Request, error) {
	get := func() (fleet.Request, error) {
		r, err := s.cfg.Store.Request(ctx, t.tenant, t.request)
		if err != nil {
			return r, err
		}
		r, _, _ = enroll.Expire(s.cfg.Now(), r)
		return r, nil
	}
	full, busy := s.polls.enter(t.request)
	if busy {
		return fleet.Request{}, errBusy
	}
	if full {
		return get()
	}
	defer s.polls.leave(t.request)
	if wait <= 0 {
		return get()
	}
	// Subscribe before the first look, so that no change falls in between.
	changed, done := s.cfg.Store.Changed(t.request)
	defer done()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		r, err := get()
		if err != nil || r.State != fleet.RequestPending && r.State != fleet.RequestQuarantined {
			return r, err
		}
		select {
		case _, open := <-changed:
			if !open {
				changed = nil
				return get()
			}
		case <-timer.C:
			return get()
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
}

// issue makes or finds the certificate. All that matters is looked at inside
// the store's transaction.
func (s *Service) issue(ctx context.Context, t ticket, r fleet.Request, key *ecdsa.PublicKey) (enroll.Issued, error) {
	hash, err := enroll.KeyHash(key)
	if err != nil {
		return enroll.Issued{}, err
	}
	denied, err := s.cfg.Store.Denied(ctx, t.tenant, append([]fleet.EKHash{r.Evidence.EK}, r.Evidence.Aliases...))
	if err != nil {
		return enroll.Issued{}, fmt.Errorf("service: look for denial: %w", err)
	}
	if denied {
		return enroll.Issued{}, enroll.ErrDenied
	}
	failpoint.Hit("enroll/collect/before-issue")
	start, made := time.Now(), false
	out, err := s.cfg.Store.Issue(ctx, t.tenant, t.request, func(r fleet.Request) (enroll.Issued, error) {
		made = true
		return s.make(ctx, r, key, hash)
	})
	if err != nil {
		return enroll.Issued{}, err
	}
	failpoint.Hit("enroll/collect/after-issue")
	if made {
		s.observe(CallIssue, start, nil)
	}
	return out, checkLeaf(out.Certificates, key)
}

// make makes a certificate for the request, which is as the store's
// transaction has it.
func (s *Service) make(ctx context.Context, r fleet.Request, key *ecdsa.PublicKey, hash fleet.HexBytes) (enroll.Issued, error) {
	now := s.cfg.Now()
	if err := enroll.MayIssue(now, r, hash); err != nil {
		return enroll.Issued{}, err
	}
	cert, err := s.cfg.Issuer.IssueNode(ctx, pki.NodeProfile{Tenant: r.Tenant, Site: r.Site, Node: r.Node, Public: key, Now: now})
	if err != nil {
		return enroll.Issued{}, fmt.Errorf("service: issue: %w", err)
	}
	issued := enroll.Issued{
		Certificates: cert.Chain, Serial: cert.Serial, NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, LDevIDKey: hash,
	}
	if s.cfg.Documents != nil {
		if issued.Documents, err = s.cfg.Documents(ctx, r, now); err != nil {
			return enroll.Issued{}, fmt.Errorf("service: documents: %w", err)
		}
	}
	return issued, checkLeaf(issued.Certificates, key)
}

// checkLeaf makes sure that no certificate for another key is stored or sent,
// whatever issuer and store do.
func checkLeaf(chain [][]byte, key *ecdsa.PublicKey) error {
	if len(chain) == 0 {
		return errors.New("service: issued certificate: the chain is empty")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("service: issued certificate: %w", err)
	}
	if !key.Equal(leaf.PublicKey) {
		return errors.New("service: issued certificate: it is for another key")
	}
	return nil
}
