package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

// ErrEnroll says that the centre will not renew this certificate however
// often it is asked: enrolling is the way on. Errors without it are outages.
var ErrEnroll = errors.New("client: the certificate cannot be renewed; enroll again")

// Renew asks the centre that gave id, then the others, once each, for a new
// certificate for the same key, proving the machine anew. While the one it
// has is fresh the centre may answer with that. The error is ErrEnroll, or
// says why no centre could be asked.
func (c *Client) Renew(ctx context.Context, id Identity) (Identity, error) {
	var errs []error
	urls := []string{id.Centre}
	for _, u := range c.urls {
		if u != id.Centre {
			urls = append(urls, u)
		}
	}
	for _, u := range urls {
		if u == "" {
			continue
		}
		out, err := c.renewAt(ctx, u, id)
		if err == nil || errors.Is(err, ErrEnroll) || ctx.Err() != nil {
			return out, err
		}
		errs = append(errs, err)
	}
	return Identity{}, errors.Join(errs...)
}

func (c *Client) renewAt(ctx context.Context, centre string, id Identity) (Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	conn, err := c.dialAs(ctx, centre, id)
	if err != nil {
		return Identity{}, err
	}
	defer conn.Close()
	state := conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(enroll.ExporterLabel, nil, enroll.ExporterLength)
	if err != nil {
		return Identity{}, fmt.Errorf("client: TLS exporter: %w", err)
	}
	m, err := c.RenewalFor(ctx, exporter)
	if err != nil {
		return Identity{}, err
	}
	// The proof is about this one connection.
	used := false
	transport := &http.Transport{
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			if used {
				return nil, errLost
			}
			used = true
			return conn, nil
		},
		MaxConnsPerHost: 1, MaxResponseHeaderBytes: 64 << 10, DisableCompression: true,
	}
	defer transport.CloseIdleConnections()
	rpc := musterv1connect.NewNodeServiceClient(&http.Client{Transport: transport, CheckRedirect: noRedirect}, centre,
		connect.WithReadMaxBytes(maxAnswer), connect.WithAcceptCompression("gzip", nil, nil))
	out, err := rpc.Renew(ctx, m)
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeFailedPrecondition, connect.CodeInvalidArgument,
		connect.CodeUnimplemented:
		return Identity{}, fmt.Errorf("%w: %w", ErrEnroll, err)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("client: renew: %w", err)
	}
	if err := c.ours(out.GetCertificates()); err != nil {
		return Identity{}, err
	}
	id.Centre, id.Certificates, id.Documents = centre, out.GetCertificates(), out.GetDocuments()
	return id, nil
}

// dialAs opens a connection that the LDevID key in the TPM authenticates.
func (c *Client) dialAs(ctx context.Context, centre string, id Identity) (*tls.Conn, error) {
	u, err := url.Parse(centre)
	if err != nil {
		return nil, fmt.Errorf("client: centre URL: %w", err)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return c.dialTLS(ctx, "tcp", net.JoinHostPort(u.Hostname(), port), func(t *tls.Config) {
		t.Certificates = []tls.Certificate{c.certificate(id)}
	})
}

// RenewalFor proves the machine to whoever has the other end of a TLS
// connection with this exporter: what Renew sends.
func (c *Client) RenewalFor(ctx context.Context, exporter []byte) (*musterv1.RenewRequest, error) {
	id, err := c.cfg.TPM.Identity(ctx)
	if err != nil {
		return nil, &tpmError{err}
	}
	if len(id.EKs) == 0 {
		return nil, &tpmError{errors.New("client: the TPM has no endorsement key")}
	}
	ek, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return nil, &tpmError{err}
	}
	ekDER, err := x509.MarshalPKIXPublicKey(ek.Public)
	if err != nil {
		return nil, &tpmError{err}
	}
	csr, err := c.csr()
	if err != nil {
		return nil, err
	}
	hardware, err := c.hardware()
	if err != nil {
		return nil, err
	}
	m := &musterv1.RenewRequest{Keys: keysOf(id), Proof: &musterv1.CompleteRequest{Csr: csr, Hardware: hardware, EventLog: c.eventLog()}}
	return m, c.state(m.Proof, enroll.RenewalTranscript(enroll.TranscriptFields{
		EK: ekDER, AK: id.AKPublic, LDevID: id.LDevIDPublic, CSR: csr, Hardware: hardware, Exporter: exporter,
	}))
}

// state adds the TPM's statements about a transcript.
func (c *Client) state(m *musterv1.CompleteRequest, transcript [32]byte) (err error) {
	if m.CertifyAttest, m.CertifySignature, err = c.cfg.TPM.Certify(transcript); err != nil {
		return &tpmError{err}
	}
	var values map[int][]byte
	if m.QuoteAttest, m.QuoteSignature, values, err = c.cfg.TPM.Quote(transcript, pki.QuotePCRs); err != nil {
		return &tpmError{err}
	}
	for _, i := range pki.QuotePCRs {
		m.Pcrs = append(m.Pcrs, &musterv1.PcrValue{Index: uint32(i), Sha256: values[i]})
	}
	return nil
}
