package console

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"
)

// policy lets nothing in that is not ours, and nobody frame us. There is no
// inline script or style, so that markup that slipped through would be dead.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

const (
	// maxForm bounds what a browser may post.
	maxForm = 256 << 10
	// The names say to browsers: HTTPS only, this host only, all paths.
	sessionCookie = "__Host-muster" // set by the gate
	loginCookie   = "__Host-muster-login"
	themeCookie   = "__Host-muster-theme"
)

// secured sets the headers of every answer and refuses what other sites make
// browsers send.
func (c *Console) secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
		h.Set("Strict-Transport-Security", "max-age=31536000")
		h.Set("Cache-Control", "no-store")
		h.Set("Vary", "Cookie, HX-Request")
		if err := c.cross.Check(r); err != nil {
			http.Error(w, "This came from another site and was not done.", http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		next.ServeHTTP(w, r)
	})
}

// csrfOf derives the token of forms from a cookie that scripts cannot read:
// who knows the token has seen one of our pages.
func csrfOf(cookie string) string {
	m := hmac.New(sha256.New, []byte(cookie))
	m.Write([]byte("muster/console/form/v1"))
	return base64.RawURLEncoding.EncodeToString(m.Sum(nil))
}

func sameCSRF(cookie, got string) bool {
	return cookie != "" && subtle.ConstantTimeCompare([]byte(csrfOf(cookie)), []byte(got)) == 1
}

func setCookie(w http.ResponseWriter, name, value string, age time.Duration) {
	k := &http.Cookie{Name: name, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode}
	if value == "" {
		k.MaxAge = -1
	} else if age > 0 {
		k.MaxAge = int(age / time.Second)
	}
	http.SetCookie(w, k)
}

func cookieOf(r *http.Request, name string) string {
	k, err := r.Cookie(name)
	if err != nil || len(k.Value) > 256 {
		return ""
	}
	return k.Value
}

// localPath returns p if it leads to a page of this server, and else "/".
// Browsers read "//host", "/\host" and what has control characters in it as
// something else than a path.
func localPath(p string) string {
	if !strings.HasPrefix(p, "/") || len(p) > 512 || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == '\\' || r == 0x7f }) {
		return "/"
	}
	u, err := url.Parse(p)
	if err != nil || u.Scheme != "" || u.Host != "" || u.User != nil || strings.HasPrefix(p, "//") || path.Clean(u.Path) != u.Path && path.Clean(u.Path)+"/" != u.Path ||
		strings.HasPrefix(u.Path, "/login") || strings.HasPrefix(u.Path, "/logout") || strings.HasPrefix(u.Path, "/auth/") {
		return "/"
	}
	return p
}

// sourceOf is the address without its port.
func sourceOf(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// limiter bounds failed logins per network: some at once, then one each so
// often. Networks are /24 and /64, since addresses inside them are free.
type limiter struct {
	burst int
	every time.Duration

	mu   sync.Mutex
	full map[string]time.Time // when the bucket is full again
	// swept is when buckets that are full again were last dropped: a flood
	// shall not make each attempt look at all of them.
	swept time.Time
}

const (
	maxLimited = 10000
	others     = "others"
)

func newLimiter(burst int, every time.Duration) *limiter {
	return &limiter{burst: burst, every: every, full: make(map[string]time.Time)}
}

func networkOf(source string) string {
	ip := net.ParseIP(source)
	if ip == nil {
		return source
	}
	if v4 := ip.To4(); v4 != nil {
		return v4.Mask(net.CIDRMask(24, 32)).String()
	}
	return ip.Mask(net.CIDRMask(64, 128)).String()
}

// wait says how long the source has to wait before it may try; 0: it may.
func (l *limiter) wait(now time.Time, source string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, known := l.full[networkOf(source)]
	if !known && len(l.full) >= maxLimited {
		at = l.full[others]
	}
	if !at.After(now) {
		return 0
	}
	return max(at.Sub(now)-time.Duration(l.burst-1)*l.every, 0)
}

// failed counts a failed login.
func (l *limiter) failed(now time.Time, source string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := networkOf(source)
	if len(l.full) >= maxLimited {
		if now.Sub(l.swept) >= l.every {
			l.swept = now
			for k, t := range l.full {
				if t.Before(now) {
					delete(l.full, k)
				}
			}
		}
		// A botnet: who is new shares one bucket.
		if _, known := l.full[key]; !known && len(l.full) >= maxLimited {
			key = others
		}
	}
	at := l.full[key]
	if at.Before(now) {
		at = now
	}
	l.full[key] = at.Add(l.every)
}
