package recovery

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/agent"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// Bounds of the pause between reports: the centre steers within them.
const (
	defaultReport = time.Minute
	minReport     = 5 * time.Second
	maxReport     = time.Hour
	reportTimeout = 30 * time.Second
	// renewPause is the least pause between two attempts to renew.
	renewPause = 30 * time.Minute
)

// ErrNotANode says that the certificate is no longer good for the centre:
// refused, or running out and not renewed. Enrolling again is the way on; with
// unchanged evidence it needs no person.
var ErrNotANode = errors.New("recovery: the certificate has to be renewed")

// Centre is one URL of the node endpoint: the part of the generated client
// that a reporter needs.
type Centre interface {
	Report(context.Context, *musterv1.ReportRequest) (*musterv1.ReportResponse, error)
}

// Reporter tells the centre now and then that an enrolled machine in recovery
// is alive. It is the only habit of a machine that waits for orders.
type Reporter struct {
	// Centres are tried in turn; the one that answered stays.
	Centres []Centre
	// Leaf is the node's certificate.
	Leaf  *x509.Certificate
	Image string
	// Renew gets a new certificate and what calls the centres with it; nil:
	// enrolling is the only way to one. Its error is ErrNotANode (wrapped) if
	// asking again is useless, anything else is an outage.
	Renew func(context.Context) (Renewed, error)
	// Hardware is part of the status whose digest is reported.
	Hardware func() fleet.Hardware
	Now      func() time.Time
	// Hang up after each report: thousands of idle connections help nobody.
	HangUp func()
	// Heard is told after each attempt whether the centre answered.
	Heard func(answered bool)
	Log   *slog.Logger
}

// Renewed is a new certificate.
type Renewed struct {
	Leaf    *x509.Certificate
	Centres []Centre
	HangUp  func()
}

// Run reports until ctx ends or the certificate is no longer good.
func (r *Reporter) Run(ctx context.Context) error {
	if len(r.Centres) == 0 || r.Leaf == nil {
		return errors.New("recovery: report: no centre or no certificate")
	}
	boot := make([]byte, 16)
	if _, err := rand.Read(boot); err != nil {
		return fmt.Errorf("recovery: report: %w", err)
	}
	wait := agent.Backoff{First: minReport, Most: defaultReport}
	at := 0
	plan := agent.RenewalOf(r.Leaf.NotBefore, r.Leaf.NotAfter, mrand.Float64())
	var asked time.Time // by the monotonic clock
	for {
		if now := r.Now(); !now.Before(plan.Due) {
			left := r.Leaf.NotAfter.Sub(now).Round(time.Minute)
			if r.Renew == nil || !now.Before(plan.Late) {
				return fmt.Errorf("%w: %s left", ErrNotANode, left)
			}
			if asked.IsZero() || time.Since(asked) >= renewPause {
				asked = time.Now()
				renewed, err := r.renew(ctx)
				if err != nil {
					return err
				}
				if renewed {
					plan, at = agent.RenewalOf(r.Leaf.NotBefore, r.Leaf.NotAfter, mrand.Float64()), 0
				}
			}
		}
		next, err := r.once(ctx, r.Centres[at], boot)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			wait.Reset()
		case connect.CodeOf(err) == connect.CodeUnauthenticated, connect.CodeOf(err) == connect.CodePermissionDenied:
			return fmt.Errorf("%w: %w", ErrNotANode, err)
		default:
			r.Log.Info("report not heard", "err", err)
			at = (at + 1) % len(r.Centres)
			next = wait.Next(mrand.Float64())
		}
		r.Heard(err == nil)
		if pause(ctx, next); ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// renew asks for a new certificate once. An outage is no error: there is time
// for more attempts, and reports go on meanwhile.
func (r *Reporter) renew(ctx context.Context) (bool, error) {
	out, err := r.Renew(ctx)
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case errors.Is(err, ErrNotANode):
		return false, err
	case err != nil:
		r.Log.Info("certificate not renewed", "err", err)
		return false, nil
	case out.Leaf == nil || len(out.Centres) == 0 || !out.Leaf.NotAfter.After(r.Leaf.NotAfter):
		// The centre's clock may be behind ours.
		r.Log.Info("the centre holds the certificate for fresh")
		return false, nil
	}
	r.HangUp()
	r.Leaf, r.Centres, r.HangUp = out.Leaf, out.Centres, out.HangUp
	r.Log.Info("certificate renewed", "until", out.Leaf.NotAfter)
	return true, nil
}

// once makes one report and returns when the next one is due, with jitter.
func (r *Reporter) once(ctx context.Context, c Centre, boot []byte) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	defer func() { r.HangUp() }()
	status, err := json.Marshal(r.Hardware())
	if err != nil {
		return 0, fmt.Errorf("recovery: report: %w", err)
	}
	digest := sha256.Sum256(status)
	answer, err := c.Report(ctx, &musterv1.ReportRequest{Image: r.Image, StatusDigest: digest[:], BootId: boot})
	if err != nil {
		return 0, err
	}
	next := defaultReport
	if s := answer.GetNextReportSeconds(); s > 0 {
		next = min(max(time.Duration(s)*time.Second, minReport), maxReport)
	}
	return next - time.Duration(float64(next)*0.2*mrand.Float64()), nil
}
