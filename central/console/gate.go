package console

import (
	"context"
	"errors"
	"net/http"
)

// ErrNoSession: the cookie is of no session, or of one that has ended.
var ErrNoSession = errors.New("console: no session")

// Session is one person who is logged in.
type Session struct {
	// Actor is the person as the audit log names them: "user:anna".
	Actor string
	// Role and Tenant are for display. What the person may do is asked of the
	// API, call by call.
	Role, Tenant string
	// State is the gate's own.
	State any
}

// Gate knows who is logged in. The centre implements it.
type Gate interface {
	// Login begins a session for whoever holds the token and sets its cookie,
	// SessionCookie: a new secret each time, so that one that a browser
	// brought along is never taken over.
	Login(w http.ResponseWriter, r *http.Request, token string) error
	// Session finds who sends the request, or ErrNoSession.
	Session(r *http.Request) (Session, error)
	// Logout ends the session of the request and drops its cookie; having
	// none is no error.
	Logout(w http.ResponseWriter, r *http.Request) error
	// As returns a context with which calls of the API are made as this
	// person.
	As(ctx context.Context, s Session) context.Context
}
