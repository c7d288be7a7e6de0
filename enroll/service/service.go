// Package service is the centre's side of enrollment: the Connect handler of
// muster.v1.EnrollmentService. It proves machines and files requests; who may
// become a node is decided elsewhere (package enroll, and people).
//
// Before a machine has proved its TPM nothing is stored for it: all state of
// a challenge is in a sealed cookie. ../DESIGN.md says why.
package service

import (
	"log/slog"
	"net/http"
	"time"
)

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
	// Log gets one line per refused or filed machine; default: none.
	Log    *slog.Logger
	Limits Limits
}

// Limits bound what callers can use up. Zero values mean the defaults.
type Limits struct {
	// Workers run verifications at the same time; default GOMAXPROCS. Queue
	// calls may wait for one, default 64; more are refused with Unavailable.
	Workers, Queue int
	// BeginsPerMinute limits Begin and Complete calls per source address,
	// default 120; per IPv4 /24 or IPv6 /64 it is 8 times that. Negative:
	// no limit.
	BeginsPerMinute int
	// Sources bounds the table of source addresses; default 65,536.
	Sources int
	// LongPolls may wait at the same time; default 65,536. More are answered
	// at once.
	LongPolls int
	// MaxUnverified: see enroll.Filing.
	MaxUnverified int
}

// Service implements musterv1connect.EnrollmentServiceHandler.
type Service struct{ cfg Config }

// New checks cfg and makes a Service.
func New(cfg Config) (*Service, error) { return &Service{cfg: cfg}, nil }

// Handler returns the path prefix and the HTTP handler to mount on the node
// endpoint. It adds the connection's TLS exporter and the source address to
// the context and bounds bodies; the bare Connect handler must not be used.
func (s *Service) Handler() (path string, h http.Handler) { return "", nil }
