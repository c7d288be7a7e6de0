package service

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll"
)

// Caps of request bodies in bytes, by procedure. Anything else is small.
const (
	maxBody         = 2 << 20
	maxBeginBody    = 64 << 10
	maxCompleteBody = maxBody
	maxRenewBody    = maxBody
	maxSmallBody    = 4 << 10
	// bodyTime is how long a body may take, and how long a call may last.
	bodyTime = 90 * time.Second
)

// Constant keys of log lines.
const (
	keyCall      = "call"
	keySource    = "source"
	keyWhy       = "why"
	keyReference = "reference"
	keyRequest   = "request"
	keyNode      = "node"
	keyState     = "state"
	keyError     = "error"
)

// calls names what an Observation calls the procedures.
var calls = map[string]string{
	musterv1connect.EnrollmentServiceBeginProcedure:    CallBegin,
	musterv1connect.EnrollmentServiceCompleteProcedure: CallComplete,
	musterv1connect.EnrollmentServiceCollectProcedure:  CallCollect,
	musterv1connect.NodeServiceRenewProcedure:          CallRenew,
}

// connection is what the HTTP layer knows of the caller.
type connection struct {
	source netip.Addr
	// exporter is the TLS exporter; bound is false without TLS 1.3.
	exporter [enroll.ExporterLength]byte
	bound    bool
	// opened is when the connection was accepted; zero: not known.
	opened time.Time
}

type connectionKey struct{}

func connectionOf(ctx context.Context) connection {
	c, _ := ctx.Value(connectionKey{}).(connection)
	return c
}

// Handler returns the path prefix and the HTTP handler to mount on the node
// endpoint. It adds the connection's TLS exporter and the source address to
// the context, limits the rate of calls and bounds bodies; the bare Connect
// handler must not be used.
func (s *Service) Handler() (path string, h http.Handler) {
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxBody),
		// No decompression of what strangers send.
		connect.WithCompression("gzip", nil, nil),
		connect.WithRecover(func(_ context.Context, spec connect.Spec, _ http.Header, p any) error {
			return s.fault(spec.Procedure, fmt.Errorf("panic: %v", p))
		}),
	}
	path, rpc := musterv1connect.NewEnrollmentServiceHandler(s, options...)
	return path, s.guard(connect.NewErrorWriter(options...), rpc)
}

// bodyCaps are the calls that carry more than a few bytes: how large they may
// be. These are the ones whose rate is limited.
var bodyCaps = map[string]int64{
	musterv1connect.EnrollmentServiceBeginProcedure:    maxBeginBody,
	musterv1connect.EnrollmentServiceCompleteProcedure: maxCompleteBody,
	musterv1connect.NodeServiceRenewProcedure:          maxRenewBody,
}

// Node guards the handler of the node service as Handler guards enrollment,
// and gives Renew what it needs to know of the connection.
func (s *Service) Node(next http.Handler) http.Handler {
	return s.guard(connect.NewErrorWriter(), next)
}

// guard bounds rate and bodies, and puts the connection into the context.
func (s *Service) guard(answer *connect.ErrorWriter, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		c := connection{source: sourceOf(r)}
		c.opened, _ = r.Context().Value(openedKey{}).(time.Time)
		if t := r.TLS; t != nil && t.Version == tls.VersionTLS13 {
			// RFC 8446 §7.5. No context value, as RFC 9266 does.
			if b, err := t.ExportKeyingMaterial(enroll.ExporterLabel, nil, enroll.ExporterLength); err == nil {
				copy(c.exporter[:], b)
				c.bound = true
			}
		}
		most, limited := bodyCaps[r.URL.Path]
		if !limited {
			most = maxSmallBody
		}
		call := calls[r.URL.Path]
		refuse := func(err error) {
			if call != "" {
				s.observe(call, start, err)
			}
			if werr := answer.Write(w, r, err); werr != nil {
				http.Error(w, "bad-request", http.StatusBadRequest)
			}
		}
		if limited {
			if wait, ok := s.limiter.take(s.cfg.Now(), c.source); !ok {
				refuse(busy(wait))
				return
			}
		}
		size := most
		if r.ContentLength >= 0 {
			size = r.ContentLength
		}
		if size > most {
			refuse(fail(connect.CodeResourceExhausted, "too-large", "the message is larger than the protocol allows"))
			return
		}
		if !s.bodies.take(c.source, size) {
			refuse(busy(time.Second))
			return
		}
		defer s.bodies.give(c.source, size)
		r.Body = http.MaxBytesReader(w, r.Body, most)
		// A body that trickles in must not hold its memory for ever.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTime))
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), connectionKey{}, c)))
	})
}

type openedKey struct{}

// ConnContext is for http.Server.ConnContext: it notes when a connection was
// opened. Statements about its TLS exporter are younger than that.
func ConnContext(now func() time.Time) func(context.Context, net.Conn) context.Context {
	return func(ctx context.Context, _ net.Conn) context.Context {
		return context.WithValue(ctx, openedKey{}, now())
	}
}

func sourceOf(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// fail makes an error for callers that proved nothing: a short word for
// programs and the next step for people, and nothing about our insides.
func fail(code connect.Code, word, next string) *connect.Error {
	return connect.NewError(code, &refusal{word: word, next: next})
}

// busy is Unavailable with Retry-After in whole seconds, at least one.
func busy(wait time.Duration) *connect.Error {
	err := fail(connect.CodeUnavailable, "busy", "try again later")
	err.Meta().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(wait.Seconds())))))
	return err
}

func beginAgain() *connect.Error {
	return fail(connect.CodeFailedPrecondition, "begin-again", "the challenge is not valid here and now; begin again on this connection")
}

func notProven(reference, check string) *connect.Error {
	return connect.NewError(connect.CodePermissionDenied, &refusal{
		word: "not-proven", next: "the proof does not hold; tell your operator the reference " + reference, check: check,
	})
}

// fault hides an error of ours and logs it under a reference.
func (s *Service) fault(call string, err error) *connect.Error {
	ref := reference()
	s.cfg.Log.Error("enrollment failed", slog.String(keyCall, call), slog.String(keyReference, ref), slog.Any(keyError, err))
	e := fail(connect.CodeUnavailable, "fault", "the centre has a problem; try again later, reference "+ref)
	e.Meta().Set("Retry-After", "5")
	return e
}

// pooled turns the errors of pool.do into answers.
func (s *Service) pooled(call string, err error) error {
	var answer *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &answer):
		return answer
	case errors.Is(err, errBusy):
		return busy(2 * time.Second)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	}
	return s.fault(call, err)
}

// reference is what connects a caller's error with our log.
func reference() string {
	var b [4]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
