// Package service is the centre's side of enrollment: the Connect handler of
// muster.v1.EnrollmentService. It proves machines and files requests; who may
// become a node is decided elsewhere (package enroll, and people).
//
// Before a machine has proved its TPM nothing is stored for it: all state of
// a challenge is in a sealed cookie. ../DESIGN.md says why.
package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/fleet"
)

// Protocol is the version of the enrollment protocol spoken here.
const Protocol = 1

// Config says what a Service works with. Store, Issuer and Policy are needed.
type Config struct {
	// Tenant that machines enroll into; default "default".
	Tenant string
	Store  Store
	Issuer Issuer
	Policy PolicyFunc
	// Documents may be nil: then a node gets its certificate only.
	Documents DocumentsFunc
	// Keys seal cookies and tickets. Default: keys of this process, new every
	// 24 h; then open tickets and challenges do not survive a restart (nodes
	// just begin again) and replicas do not understand each other.
	Keys KeysFunc
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Observe is told how each call ended; nil: nobody.
	Observe Observer
	// Log gets one line per refused or filed machine; default: none.
	Log    *slog.Logger
	Limits Limits
}

// Limits bound what callers can use up. Zero values mean the defaults.
type Limits struct {
	// Workers run verifications at the same time; default GOMAXPROCS. Queue
	// calls may wait for one, default 64; more are refused with Unavailable.
	// Begin and Complete have workers and queues of their own, so that a
	// flood of the one does not hold up the other.
	Workers, Queue int
	// PerMinute limits Begin and Complete calls per source address, default
	// 120; per IPv4 /24 or IPv6 /64 it is 8 times that. Negative: no limit.
	PerMinute int
	// Sources bounds the table of source addresses; default 65,536.
	Sources int
	// BodyBytes bounds the request bodies in memory; default 256 MiB. One
	// network (IPv4 /24, IPv6 /64) gets an eighth of it.
	BodyBytes int64
	// LongPolls may wait at the same time; default 65,536. More are answered
	// at once. For one request there are four, and more are refused.
	LongPolls int
	// MaxUnverified: see enroll.Filing.
	MaxUnverified int
}

func (l *Limits) defaults() {
	for _, d := range []struct {
		v *int
		n int
	}{
		{&l.Workers, runtime.GOMAXPROCS(0)}, {&l.Queue, 64}, {&l.PerMinute, 120},
		{&l.Sources, 1 << 16}, {&l.LongPolls, 1 << 16},
	} {
		if *d.v == 0 {
			*d.v = d.n
		}
	}
	if l.BodyBytes == 0 {
		l.BodyBytes = 256 << 20
	}
}

func (c *Config) validate() error {
	var problems []error
	need := func(ok bool, what string) {
		if !ok {
			problems = append(problems, errors.New(what))
		}
	}
	need(c.Store != nil, "Store is missing")
	need(c.Issuer != nil, "Issuer is missing")
	need(c.Policy != nil, "Policy is missing")
	need(c.Limits.Workers > 0 && c.Limits.Queue >= 0 && c.Limits.Sources > 0 && c.Limits.BodyBytes > 0 && c.Limits.LongPolls > 0, "a limit is negative")
	problems = append(problems, fleet.ValidateName("tenant", c.Tenant))
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("service: configuration: %w", err)
	}
	return nil
}

// Service implements musterv1connect.EnrollmentServiceHandler.
type Service struct {
	cfg       Config
	limiter   *limiter
	bodies    *budget
	begins    *pool
	completes *pool
	polls     *polls
}

var _ musterv1connect.EnrollmentServiceHandler = (*Service)(nil)

// New checks cfg and makes a Service.
func New(cfg Config) (*Service, error) {
	if cfg.Tenant == "" {
		cfg.Tenant = "default"
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Keys == nil {
		cfg.Keys = newMemoryKeys().current
	}
	cfg.Limits.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	l := cfg.Limits
	return &Service{
		cfg:       cfg,
		limiter:   newLimiter(l.PerMinute, l.Sources),
		bodies:    newBudget(l.BodyBytes),
		begins:    newPool(l.Workers, l.Queue),
		completes: newPool(l.Workers, l.Queue),
		polls:     newPolls(l.LongPolls),
	}, nil
}

// Hello implements the RPC.
func (s *Service) Hello(context.Context, *musterv1.HelloRequest) (*musterv1.HelloResponse, error) {
	return &musterv1.HelloResponse{
		Now: timestamppb.New(s.cfg.Now()), MinProtocol: Protocol, MaxProtocol: Protocol,
	}, nil
}
