package console

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"time"
)

const maxToken = 4096

type loginForm struct {
	Problem string
	Next    string
	// Provider is what the button of the identity provider says.
	Provider string
}

// loginPage shows the form. Its token is tied to a cookie of its own, so that
// nobody logs somebody else's browser in.
func (c *Console) loginPage(w http.ResponseWriter, r *http.Request) {
	c.askLogin(w, r, http.StatusOK, "", localPath(r.URL.Query().Get("next")))
}

func (c *Console) askLogin(w http.ResponseWriter, r *http.Request, code int, problem, next string) {
	cookie := cookieOf(r, loginCookie)
	if len(cookie) != 43 {
		b := make([]byte, 32)
		rand.Read(b)
		cookie = base64.RawURLEncoding.EncodeToString(b)
		setCookie(w, loginCookie, cookie, 0)
	}
	form := loginForm{Problem: problem, Next: next}
	if c.cfg.Provider != nil {
		form.Provider = c.cfg.Provider.Title()
	}
	c.render(w, r, code, "login", page{Title: "Log in", Path: "/login", CSRF: csrfOf(cookie), Body: form})
}

func (c *Console) login(w http.ResponseWriter, r *http.Request) {
	source, now := sourceOf(r), c.cfg.Now()
	if err := r.ParseForm(); err != nil {
		http.Error(w, "The form could not be read.", http.StatusBadRequest)
		return
	}
	next := localPath(r.PostForm.Get("next"))
	if !sameCSRF(cookieOf(r, loginCookie), r.PostForm.Get("csrf")) {
		c.askLogin(w, r, http.StatusForbidden, "The page was too old. Please try again.", next)
		return
	}
	if wait := c.logins.wait(now, source); wait > 0 {
		c.askLogin(w, r, http.StatusTooManyRequests, tryAgainIn(w, wait), next)
		return
	}
	token := strings.TrimSpace(r.PostForm.Get("token"))
	if token == "" || len(token) > maxToken {
		c.askLogin(w, r, http.StatusBadRequest, "Paste the token: it begins with muster_.", next)
		return
	}
	if err := c.cfg.Gate.Login(w, r, token); err != nil {
		c.logins.failed(now, source)
		c.cfg.Log.Warn("login refused", "address", source, "error", err)
		c.askLogin(w, r, http.StatusForbidden, "This token is not known here, was used already, or has ended. Is it of another centre?", next)
		return
	}
	setCookie(w, loginCookie, "", 0)
	http.Redirect(w, r, next, http.StatusSeeOther)
}

func tryAgainIn(w http.ResponseWriter, wait time.Duration) string {
	seconds := int((wait + time.Second - 1) / time.Second)
	w.Header().Set("Retry-After", fmt.Sprint(seconds))
	return fmt.Sprintf("Too many failed attempts from your network. Try again in %d seconds.", seconds)
}

func (c *Console) logout(v *visit) error {
	if err := c.cfg.Gate.Logout(v.w, v.r); err != nil {
		return err
	}
	v.w.Header().Set("Clear-Site-Data", `"cache", "storage"`)
	return v.to("/login")
}

// setTheme keeps a colour scheme. It needs no session, and no token: another
// site cannot send it (cookies are strict and the origin is checked), and it
// would gain nothing.
func (c *Console) setTheme(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, "The form could not be read.", http.StatusBadRequest)
		return
	}
	switch t := r.PostForm.Get("theme"); t {
	case "dark", "light":
		setCookie(w, themeCookie, t, 365*24*time.Hour)
	default:
		setCookie(w, themeCookie, "", 0)
	}
	http.Redirect(w, r, localPath(r.PostForm.Get("next")), http.StatusSeeOther)
}
