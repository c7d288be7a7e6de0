package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet/text"
)

// visit is one request of somebody who is logged in.
type visit struct {
	c    *Console
	w    http.ResponseWriter
	r    *http.Request
	ctx  context.Context
	s    Session
	csrf string
}

// problem is an error with a page of its own: what is the case, and what to
// do next.
type problem struct {
	code        int
	title, next string
}

func (p *problem) Error() string { return p.title }

// guarded lets only people with a session through, and only their own forms.
func (c *Console) guarded(h func(*visit) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cookie := cookieOf(r, sessionCookie)
		s, err := Session{}, ErrNoSession
		if cookie != "" {
			s, err = c.cfg.Gate.Session(r)
		}
		switch {
		case errors.Is(err, ErrNoSession):
			c.strangers(w, r)
			return
		case err != nil:
			c.cfg.Log.Error("session not checked", "error", err)
			http.Error(w, "The centre cannot check who you are just now. Try again in a moment.", http.StatusServiceUnavailable)
			return
		}
		v := &visit{c: c, w: w, r: r, s: s, csrf: csrfOf(cookie), ctx: c.cfg.Gate.As(r.Context(), s)}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			if err := r.ParseForm(); err != nil {
				v.fail(&problem{http.StatusBadRequest, "The form could not be read", "It may be too long. Go back and try again."})
				return
			}
			if !sameCSRF(cookie, r.PostForm.Get("csrf")) {
				v.fail(&problem{http.StatusForbidden, "This form is of another session", "Nothing was done. Open the page again and repeat what you wanted."})
				return
			}
		}
		if err := h(v); err != nil {
			v.fail(err)
		}
	})
}

// strangers sends those without a session to the login page.
func (c *Console) strangers(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/live":
		http.Error(w, "log in first", http.StatusUnauthorized)
		return
	case r.Header.Get("HX-Request") != "":
		w.Header().Set("HX-Redirect", "/login")
		http.Error(w, "log in first", http.StatusUnauthorized)
		return
	case r.Method != http.MethodGet:
		http.Redirect(w, r, "/login", http.StatusSeeOther)
		return
	case r.Header.Get("Sec-Fetch-Site") == "cross-site" && r.Header.Get("Sec-Fetch-Mode") == "navigate":
		// Somebody followed a link from a chat. Strict cookies were not sent
		// with that; a page of ours that goes there is no stranger.
		c.render(w, r, http.StatusOK, "bounce", page{Title: "One moment", Path: localPath(r.URL.RequestURI())})
		return
	}
	next := localPath(r.URL.RequestURI())
	to := "/login"
	if next != "/" {
		to += "?next=" + queryEscape(next)
	}
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// page is what every template gets.
type page struct {
	Title string
	// Nav is the entry of the menu that is lit.
	Nav     string
	Session *Session
	CSRF    string
	// Path is where the page is, for forms that come back to it.
	Path  string
	Theme string
	Now   time.Time
	Lab   bool
	// Pending is how many requests wait.
	Pending  uint32
	Warnings []string
	Version  string
	// CLI are the commands that do the same.
	CLI []string
	// Live lists the beginnings of event kinds that make the page look again.
	Live string
	Body any
}

// show renders a page within the frame; the frame's facts come from the API.
func (v *visit) show(code int, name string, p page) error {
	centre, err := v.c.api.GetCentre(v.ctx, &musterv1.GetCentreRequest{})
	if err != nil {
		return err
	}
	p.Session, p.CSRF, p.Path = &v.s, v.csrf, localPath(v.r.URL.RequestURI())
	if v.r.Method != http.MethodGet {
		p.Path = "/"
	}
	p.Now, p.Lab, p.Version = centre.Now.AsTime(), centre.Tenant.GetLab(), centre.Version
	p.Pending = centre.Requests["pending"]
	p.Warnings = append(p.Warnings, centre.Warnings...)
	v.c.render(v.w, v.r, code, name, p)
	return nil
}

func (c *Console) render(w http.ResponseWriter, r *http.Request, code int, name string, p page) {
	t := c.pages[name]
	if t == nil {
		c.cfg.Log.Error("page is missing", "page", name)
		http.Error(w, "This page is missing in the program.", http.StatusInternalServerError)
		return
	}
	switch p.Theme = cookieOf(r, themeCookie); p.Theme {
	case "dark", "light":
	default:
		p.Theme = ""
	}
	if p.Now.IsZero() {
		p.Now = c.cfg.Now()
	}
	entry := "frame"
	if r.Header.Get("HX-Request") == "true" && t.Lookup("live") != nil {
		entry = "live"
	}
	// Into memory first: half a page is worse than an error.
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, entry, &p); err != nil {
		c.cfg.Log.Error("page not rendered", "page", name, "error", err)
		http.Error(w, "This page could not be made. The centre's log says why.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(b.Bytes()) // the browser went away: nothing to do
	}
}

// codes are the API's codes as people and browsers know them.
var codes = map[connect.Code]problem{
	connect.CodeNotFound:           {http.StatusNotFound, "That is not here", ""},
	connect.CodePermissionDenied:   {http.StatusForbidden, "Your role does not allow this", "Ask somebody who may, or ask for another role."},
	connect.CodeUnauthenticated:    {http.StatusForbidden, "You are not logged in any more", "Log in again."},
	connect.CodeAborted:            {http.StatusConflict, "It has changed since you looked", "Nothing was done. Look again and decide then."},
	connect.CodeFailedPrecondition: {http.StatusConflict, "This cannot be done now", ""},
	connect.CodeInvalidArgument:    {http.StatusBadRequest, "Something in the form is not right", ""},
	connect.CodeUnavailable:        {http.StatusServiceUnavailable, "The centre is busy or stops", "Try again in a moment."},
	connect.CodeCanceled:           {http.StatusServiceUnavailable, "The call was cut off", "Try again."},
}

// sentence is an error of the API for people.
func sentence(err error) string {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return text.Clean(strings.TrimPrefix(coded.Message(), "enroll: refused: "), 512)
	}
	return ""
}

func (v *visit) fail(err error) {
	var p *problem
	if !errors.As(err, &p) {
		known, ok := codes[connect.CodeOf(err)]
		if !ok {
			v.c.cfg.Log.Error("page failed", "path", v.r.URL.Path, "error", err)
			known = problem{http.StatusInternalServerError, "This did not work", "The centre's log says why."}
		}
		if s := sentence(err); s != "" && ok {
			known.next = strings.TrimSpace(upper(s) + ". " + known.next)
		}
		p = &known
	}
	v.c.render(v.w, v.r, p.code, "problem", page{
		Title: p.title, Session: &v.s, CSRF: v.csrf, Path: "/", Body: map[string]any{"Title": p.title, "Next": p.next, "Code": p.code},
	})
}

// to sends the browser on after something was done.
func (v *visit) to(format string, args ...any) error {
	http.Redirect(v.w, v.r, fmt.Sprintf(format, args...), http.StatusSeeOther)
	return nil
}
