package recovery

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// answers is a centre that answers by a function.
type answers func(n int) (*musterv1.ReportResponse, error)

type centre struct {
	calls  int
	last   *musterv1.ReportRequest
	answer answers
}

func (c *centre) Report(_ context.Context, q *musterv1.ReportRequest) (*musterv1.ReportResponse, error) {
	c.calls++
	c.last = q
	return c.answer(c.calls)
}

func reporter(cs ...Centre) (*Reporter, *[]bool) {
	heard := &[]bool{}
	now := time.Now()
	return &Reporter{
		Centres: cs, Leaf: &x509.Certificate{NotBefore: now, NotAfter: now.Add(30 * 24 * time.Hour)}, Image: "recovery@1",
		Hardware: func() fleet.Hardware { return fleet.Hardware{} }, Now: time.Now, HangUp: func() {},
		Heard: func(ok bool) { *heard = append(*heard, ok) }, Log: slog.New(slog.DiscardHandler),
	}, heard
}

func every(seconds uint32) answers {
	return func(int) (*musterv1.ReportResponse, error) {
		return &musterv1.ReportResponse{NextReportSeconds: seconds}, nil
	}
}

func TestReporterKeepsThePaceOfTheCentreWithinBounds(t *testing.T) {
	for _, c := range []struct {
		name         string
		seconds      uint32
		least, mosts int // calls in an hour
	}{
		{"when the centre says nothing then about a minute", 0, 60, 76},
		{"when the centre says ten minutes then that", 600, 6, 8},
		{"when the centre says one second then five", 1, 720, 901},
		{"when the centre says for ever then an hour", 1 << 31, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				at := &centre{answer: every(c.seconds)}
				r, _ := reporter(at)
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				if err := r.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Fatal(err)
				}
				if at.calls < c.least || at.calls > c.mosts {
					t.Errorf("%d calls in an hour, want %d to %d", at.calls, c.least, c.mosts)
				}
				if len(at.last.BootId) != 16 || len(at.last.StatusDigest) != 32 || at.last.Image != "recovery@1" {
					t.Errorf("report says %v", at.last)
				}
			})
		})
	}
}

func TestReporterOutlivesOutagesAndChangesCentres(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dead := &centre{answer: func(int) (*musterv1.ReportResponse, error) {
			return nil, connect.NewError(connect.CodeUnavailable, errors.New("down"))
		}}
		alive := &centre{answer: every(60)}
		r, heard := reporter(dead, alive)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if err := r.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		if dead.calls != 1 || alive.calls < 8 || (*heard)[0] || !(*heard)[1] {
			t.Errorf("dead one called %d times, living one %d, heard %v", dead.calls, alive.calls, *heard)
		}
	})
}

func TestReporterEndsWhenTheCertificateIsNotGood(t *testing.T) {
	for _, code := range []connect.Code{connect.CodeUnauthenticated, connect.CodePermissionDenied} {
		r, _ := reporter(&centre{answer: func(int) (*musterv1.ReportResponse, error) {
			return nil, connect.NewError(code, errors.New("no"))
		}})
		if err := r.Run(t.Context()); !errors.Is(err, ErrNotANode) {
			t.Errorf("%s: %v", code, err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		r, _ := reporter(&centre{answer: every(3600)})
		start := time.Now()
		err := r.Run(t.Context())
		if days := time.Since(start).Hours() / 24; !errors.Is(err, ErrNotANode) || days < 19.9 || days > 20.2 {
			t.Errorf("after %.1f days of 30: %v", days, err)
		}
	})
}
