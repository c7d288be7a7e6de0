package recovery

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
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
		if days := time.Since(start).Hours() / 24; !errors.Is(err, ErrNotANode) || days < 19.9 || days > 22.7 {
			t.Errorf("after %.1f days of 30: %v", days, err)
		}
	})
}

// certified is a centre's answer to a renewal: 30 days from now.
func certified(c *centre) (Renewed, error) {
	now := time.Now()
	return Renewed{Leaf: &x509.Certificate{NotBefore: now, NotAfter: now.Add(30 * 24 * time.Hour)}, Centres: []Centre{c}, HangUp: func() {}}, nil
}

func TestReporterRenews(t *testing.T) {
	down := errors.New("down")
	for _, c := range []struct {
		name string
		// renew answers the nth attempt.
		renew func(n int, at *centre) (Renewed, error)
		// days until Run ends, 0: it does not; attempts in 100 days.
		least, most         float64
		attempts, mostTimes int
	}{
		{"when the centre renews then it goes on for ever", func(_ int, at *centre) (Renewed, error) { return certified(at) }, 0, 0, 4, 5},
		{"when the centre refuses then it enrolls at once", func(int, *centre) (Renewed, error) { return Renewed{}, fmt.Errorf("%w: changed", ErrNotANode) }, 19.9, 22.7, 1, 1},
		{"when the centre is down then it tries until a sixth is left", func(int, *centre) (Renewed, error) { return Renewed{}, down }, 24.9, 25.2, 50, 300},
		{"when the centre is down for a while then it renews later", func(n int, at *centre) (Renewed, error) {
			if n < 5 {
				return Renewed{}, down
			}
			return certified(at)
		}, 0, 0, 8, 9},
		{"when the centre gives the old one back then it enrolls in the end", func(int, *centre) (Renewed, error) {
			return Renewed{Leaf: &x509.Certificate{}, Centres: []Centre{nil}}, nil
		}, 24.9, 25.2, 50, 300},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				old, next := &centre{answer: every(3600)}, &centre{answer: every(3600)}
				r, _ := reporter(old)
				n := 0
				r.Renew = func(context.Context) (Renewed, error) { n++; return c.renew(n, next) }
				ctx, cancel := context.WithTimeout(t.Context(), 100*24*time.Hour)
				defer cancel()
				start := time.Now()
				err := r.Run(ctx)
				days := time.Since(start).Hours() / 24
				if c.least == 0 && (!errors.Is(err, context.DeadlineExceeded) || next.calls < 1000) {
					t.Errorf("after %.1f days, %d calls by new certificates: %v", days, next.calls, err)
				}
				if c.least > 0 && (!errors.Is(err, ErrNotANode) || days < c.least || days > c.most || next.calls > 0) {
					t.Errorf("after %.1f days: %v", days, err)
				}
				if n < c.attempts || n > c.mostTimes {
					t.Errorf("%d attempts, want %d to %d", n, c.attempts, c.mostTimes)
				}
			})
		})
	}
}
