package central

import (
	"context"
	"errors"
	"net/http"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/console"
	"github.com/muster-edge/muster/fleet/access"
)

// consoleHandler serves the console beside the API, as a client of it.
func (s *Server) consoleHandler() (http.Handler, error) {
	cfg := console.Config{API: s.Inside(), Gate: door{s}, Log: s.log, Now: s.cfg.Now, Stopping: s.stopping}
	if s.provider != nil {
		cfg.Provider = s.provider
	}
	c, err := console.New(cfg)
	if err != nil {
		return nil, err
	}
	return c.Handler(), nil
}

// door is the gate of the console: sessions as everybody has them.
type door struct{ s *Server }

// Login implements console.Gate.
func (d door) Login(w http.ResponseWriter, r *http.Request, token string) error {
	who, err := d.s.loginByToken(r.Context(), token, sourceOf(r.RemoteAddr))
	if err != nil {
		d.s.metrics.refused.WithLabelValues("login", connect.CodeOf(err).String()).Inc()
		return err
	}
	return d.s.openSession(r.Context(), w, r, who)
}

// Session implements console.Gate.
func (d door) Session(r *http.Request) (console.Session, error) {
	p, err := d.s.SessionPrincipal(r)
	if errors.Is(err, ErrNoSession) {
		return console.Session{}, console.ErrNoSession
	}
	return console.Session{Actor: p.Actor(), Role: p.Role().String(), Tenant: p.Tenant, State: p}, err
}

// Logout implements console.Gate.
func (d door) Logout(w http.ResponseWriter, r *http.Request) error { return d.s.closeSession(w, r) }

// As implements console.Gate.
func (d door) As(ctx context.Context, s console.Session) context.Context {
	p, _ := s.State.(access.Principal) // nobody may do nothing
	return access.NewContext(ctx, p)
}
