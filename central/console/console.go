package console

import (
	"errors"
	"html/template"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
)

// Config says what a Console shows, and to whom.
type Config struct {
	// API leads to the management service, with its checks, inside the
	// process. Calls have a context of Gate.As.
	API http.RoundTripper
	// Gate knows who is logged in.
	Gate Gate
	// Provider is the identity provider; nil: there is none.
	Provider Provider
	Log      *slog.Logger
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Stopping, if set, is closed when the centre begins to stop: live
	// updates end then, since they would hold it up.
	Stopping <-chan struct{}
	// Streams bounds the open live updates of one session (default 8) and of
	// all together (default 512).
	StreamsPerSession, Streams int
	// LoginBurst and LoginEvery bound failed logins of one address: so many
	// at once, then one each so often. Default 5 and 6 s.
	LoginBurst int
	LoginEvery time.Duration
}

func (c *Config) setDefaults() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.StreamsPerSession <= 0 {
		c.StreamsPerSession = 8
	}
	if c.Streams <= 0 {
		c.Streams = 512
	}
	if c.LoginBurst <= 0 {
		c.LoginBurst = 5
	}
	if c.LoginEvery <= 0 {
		c.LoginEvery = 6 * time.Second
	}
}

func (c *Config) validate() error {
	var errs []error
	if c.API == nil {
		errs = append(errs, errors.New("console: config: API is missing"))
	}
	if c.Gate == nil {
		errs = append(errs, errors.New("console: config: Gate is missing"))
	}
	return errors.Join(errs...)
}

// Console serves the pages.
type Console struct {
	cfg     Config
	api     musterv1connect.ManagementServiceClient
	people  musterv1connect.AccessServiceClient
	pages   map[string]*template.Template
	assets  assets
	cross   *http.CrossOriginProtection
	logins  *limiter
	streams *streams
}

// New returns a Console; its Handler serves it.
func New(cfg Config) (*Console, error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	c := &Console{
		cfg: cfg, assets: loadAssets(), cross: http.NewCrossOriginProtection(),
		logins: newLimiter(cfg.LoginBurst, cfg.LoginEvery), streams: newStreams(cfg.Streams, cfg.StreamsPerSession),
	}
	client := &http.Client{Transport: cfg.API}
	// The address is never dialled.
	c.api = musterv1connect.NewManagementServiceClient(client, "https://console.invalid", connect.WithReadMaxBytes(64<<20))
	c.people = musterv1connect.NewAccessServiceClient(client, "https://console.invalid", connect.WithReadMaxBytes(64<<20))
	var err error
	c.pages, err = parsePages(c.assets)
	return c, err
}

// Handler serves the console. It owns every path but those of the API.
func (c *Console) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET "+assetPrefix, c.assets)
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, c.assets.byName["favicon.svg"].url, http.StatusFound)
	})
	mux.HandleFunc("GET /login", c.loginPage)
	mux.HandleFunc("POST /login", c.login)
	mux.HandleFunc("POST /theme", c.setTheme)
	mux.HandleFunc("GET /auth/oidc", c.beginProvider)
	mux.HandleFunc("GET /auth/oidc/callback", c.finishProvider)
	for pattern, h := range c.routes() {
		mux.Handle(pattern, c.guarded(h))
	}
	missing := c.guarded(func(v *visit) error {
		return &problem{http.StatusNotFound, "There is no such page", "The address may be mistyped, or the page has moved."}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		// A program that asks for what is not here must not take the log-in
		// page for an answer.
		if _, err := c.cfg.Gate.Session(r); err != nil {
			http.NotFound(w, r)
			return
		}
		missing.ServeHTTP(w, r)
	})
	return c.secured(mux)
}

// routes are the pages for people with a session.
func (c *Console) routes() map[string]func(*visit) error {
	return map[string]func(*visit) error{
		"GET /{$}":                    c.queue,
		"GET /requests":               c.requests,
		"GET /requests/{id}":          c.request,
		"POST /requests/{id}/approve": c.approve,
		"POST /requests/{id}/reject":  c.reject,
		"POST /requests/{id}/release": c.release,
		"POST /bulk":                  c.bulk,
		"POST /bulk/apply":            c.bulkApply,
		"GET /nodes":                  c.nodes,
		"GET /nodes/{id}":             c.node,
		"POST /nodes/{id}/deny":       c.deny,
		"POST /nodes/{id}/allow":      c.allow,
		"POST /nodes/{id}/assign":     c.assign,
		"POST /nodes/{id}/remove":     c.remove,
		"GET /sites":                  c.sites,
		"GET /sites/{name}":           c.site,
		"GET /images":                 c.images,
		"GET /events":                 c.events,
		"GET /audit":                  c.audit,
		"GET /access":                 c.access,
		"GET /help":                   c.help,
		"GET /live":                   c.live,
		"POST /logout":                c.logout,
		"POST /access/grant":          c.grant,
		"POST /access/revoke":         c.revoke,
		"POST /access/invite":         c.invite,
		"GET /tokens":                 c.tokens,
		"POST /tokens":                c.createToken,
		"POST /tokens/revoke":         c.revokeToken,
		"GET /stacks":                 c.stacks,
		"GET /stacks/{name}":          c.stack,
	}
}

// Patterns are the routes that want a session, for tests that walk them all.
func Patterns() []string { return slices.Sorted(maps.Keys((*Console)(nil).routes())) }
