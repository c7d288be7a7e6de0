package console

import (
	"errors"
	"net/http"
	"time"
)

// Provider lets people log in at an identity provider. The centre implements
// it.
type Provider interface {
	// Title is what the button on the log-in page says.
	Title() string
	// Begin returns where to send the browser.
	Begin(w http.ResponseWriter, r *http.Request, next string) (to string, err error)
	// Finish takes what the browser brought back.
	Finish(w http.ResponseWriter, r *http.Request) (Arrival, error)
}

// Arrival is somebody whom the provider knows and who has a role here.
type Arrival struct {
	// Next is where the browser goes on, with a session.
	Next string
	// Line is set if a command line asked, which gets a token; the browser
	// has no session then.
	Line *CommandLine
}

// CommandLine is a command line that wants to be logged in.
type CommandLine struct {
	Name, Check string
	// URL leads to the command line on the person's own computer.
	URL string
}

// LoginProblem is why somebody was not let in, for a page of its own.
type LoginProblem struct {
	Code        int
	Title, Text string
	// Details are further sentences; Commands help an administrator.
	Details, Commands []string
	// Tried counts it as a failed attempt.
	Tried bool
}

// Error implements error.
func (p *LoginProblem) Error() string { return p.Title + ": " + p.Text }

func (c *Console) beginProvider(w http.ResponseWriter, r *http.Request) {
	if c.cfg.Provider == nil {
		c.loginProblem(w, r, &LoginProblem{Code: http.StatusNotFound, Title: "This centre has no identity provider", Text: "Log in with a token."})
		return
	}
	to, err := c.cfg.Provider.Begin(w, r, localPath(r.URL.Query().Get("next")))
	if err != nil {
		c.loginProblem(w, r, err)
		return
	}
	http.Redirect(w, r, to, http.StatusSeeOther)
}

func (c *Console) finishProvider(w http.ResponseWriter, r *http.Request) {
	if c.cfg.Provider == nil {
		c.beginProvider(w, r)
		return
	}
	source, now := sourceOf(r), c.cfg.Now()
	if wait := c.logins.wait(now, source); wait > 0 {
		c.loginProblem(w, r, c.tooMany(w, wait))
		return
	}
	a, err := c.cfg.Provider.Finish(w, r)
	if err != nil {
		var p *LoginProblem
		if errors.As(err, &p) && p.Tried {
			c.logins.failed(now, source)
		}
		c.loginProblem(w, r, err)
		return
	}
	if a.Line != nil {
		c.render(w, r, http.StatusOK, "line", page{Title: "Log a command line in", Path: "/login", Body: a.Line})
		return
	}
	// Not by a redirect: the browser comes from another site, and would leave
	// the new cookie at home.
	c.render(w, r, http.StatusOK, "bounce", page{Title: "One moment", Path: localPath(a.Next)})
}

func (c *Console) tooMany(w http.ResponseWriter, wait time.Duration) *LoginProblem {
	return &LoginProblem{Code: http.StatusTooManyRequests, Title: "Too many failed attempts", Text: tryAgainIn(w, wait)}
}

func (c *Console) loginProblem(w http.ResponseWriter, r *http.Request, err error) {
	var p *LoginProblem
	if !errors.As(err, &p) {
		c.cfg.Log.Error("log-in failed", "error", err)
		p = &LoginProblem{Code: http.StatusServiceUnavailable, Title: "The centre cannot log anybody in just now", Text: "Try again in a moment. The centre's log says why."}
	}
	c.render(w, r, p.Code, "refused", page{Title: p.Title, Path: "/login", Body: p})
}
