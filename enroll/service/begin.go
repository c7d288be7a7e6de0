package service

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

// Caps of BeginRequest. What is longer is no TPM's.
const (
	maxEKs         = 8
	maxPublic      = 1 << 10
	maxCertificate = 8 << 10
	maxChain       = 8
)

// Begin implements the RPC. It touches no store: a machine that proved
// nothing leaves nothing behind.
func (s *Service) Begin(ctx context.Context, m *musterv1.BeginRequest) (_ *musterv1.BeginResponse, err error) {
	defer func(start time.Time) { s.observe(CallBegin, start, err) }(time.Now())
	c := connectionOf(ctx)
	if !c.bound {
		return nil, fail(connect.CodeFailedPrecondition, "tls", "use TLS 1.3, straight to the centre")
	}
	if m.GetProtocol() != Protocol {
		return nil, fail(connect.CodeFailedPrecondition, "protocol",
			fmt.Sprintf("the centre speaks version %d; boot a current recovery image", Protocol))
	}
	if err := capBegin(m); err != nil {
		return nil, fail(connect.CodeInvalidArgument, "bad-request", err.Error())
	}
	var out *musterv1.BeginResponse
	err = s.begins.do(ctx, func() (err error) {
		out, err = s.challenge(ctx, c, m)
		return err
	})
	return out, s.pooled("begin", err)
}

func (s *Service) challenge(ctx context.Context, c connection, m *musterv1.BeginRequest) (*musterv1.BeginResponse, error) {
	keys, err := parseKeys(m)
	if err != nil {
		s.cfg.Log.Info("begin refused", slog.String(keySource, c.source.String()), slog.Any(keyError, err))
		return nil, fail(connect.CodeInvalidArgument, "bad-request", "the TPM's public areas cannot be used")
	}
	now := s.cfg.Now()
	k := cookie{begun: now, expires: now.Add(cookieLife), exporter: c.exporter, tenant: s.cfg.Tenant}
	_, _ = rand.Read(k.nonce[:])
	_, _ = rand.Read(k.secret[:])
	blob, enc, err := tpm.MakeCredential(rand.Reader, keys.eks[0], keys.ak.Name, k.secret[:])
	if err != nil {
		s.cfg.Log.Info("begin refused", slog.String(keySource, c.source.String()), slog.Any(keyError, err))
		return nil, fail(connect.CodeInvalidArgument, "bad-request", "no credential can be made for this EK")
	}
	if k.begin, err = proto.Marshal(m); err != nil {
		return nil, fmt.Errorf("service: keep begin: %w", err)
	}
	sealing, err := s.cfg.Keys(ctx, now)
	if err != nil {
		return nil, fmt.Errorf("service: sealing keys: %w", err)
	}
	sealed, err := seal(sealing, cookieDomain, k.encode())
	if err != nil {
		return nil, err
	}
	return &musterv1.BeginResponse{Cookie: sealed, Nonce: k.nonce[:], CredentialBlob: blob, EncryptedSecret: enc}, nil
}

// capBegin checks counts and sizes before anything is parsed.
func capBegin(m *musterv1.BeginRequest) error {
	if n := len(m.GetEks()); n == 0 || n > maxEKs {
		return fmt.Errorf("%d EKs, want 1 to %d", n, maxEKs)
	}
	size := func(what string, b []byte, most int) error {
		if len(b) > most {
			return fmt.Errorf("%s has %d bytes, at most %d", what, len(b), most)
		}
		return nil
	}
	for _, ek := range m.GetEks() {
		if err := size("EK", ek.GetPublic(), maxPublic); err != nil {
			return err
		}
		if err := size("EK certificate", ek.GetCertificate(), maxCertificate); err != nil {
			return err
		}
		if n := len(ek.GetChain()); n > maxChain {
			return fmt.Errorf("%d intermediate certificates, at most %d", n, maxChain)
		}
		for _, c := range ek.GetChain() {
			if err := size("intermediate certificate", c, maxCertificate); err != nil {
				return err
			}
		}
	}
	if err := size("AK", m.GetAkPublic(), maxPublic); err != nil {
		return err
	}
	return size("LDevID", m.GetLdevidPublic(), maxPublic)
}

// tpmKeys are the parsed public areas of a BeginRequest.
type tpmKeys struct {
	eks        []pki.Key
	ak, ldevid pki.Key
	// ekDER is the PKIX DER of the identity EK.
	ekDER []byte
}

func parseKeys(m *musterv1.BeginRequest) (tpmKeys, error) {
	var out tpmKeys
	for i, ek := range m.GetEks() {
		k, err := tpm.ParsePublic(ek.GetPublic())
		if err != nil {
			return out, fmt.Errorf("service: EK %d: %w", i, err)
		}
		out.eks = append(out.eks, k)
	}
	if len(out.eks) == 0 {
		return out, fmt.Errorf("service: no EK")
	}
	var err error
	if out.ak, err = tpm.ParsePublic(m.GetAkPublic()); err != nil {
		return out, fmt.Errorf("service: AK: %w", err)
	}
	if out.ldevid, err = tpm.ParsePublic(m.GetLdevidPublic()); err != nil {
		return out, fmt.Errorf("service: LDevID: %w", err)
	}
	if out.ekDER, err = x509.MarshalPKIXPublicKey(out.eks[0].Public); err != nil {
		return out, fmt.Errorf("service: EK: %w", err)
	}
	return out, nil
}
