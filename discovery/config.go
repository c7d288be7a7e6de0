package discovery

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Config says how much a table keeps and how fast it dials. Zero values mean
// the defaults given with each field.
type Config struct {
	// Tag is our site's; adverts must carry it. Required.
	Tag SiteTag
	// Port is the peers' usual port (7445): adverts that name it have
	// precedence over others of the same host.
	Port uint16

	// MaxHeard is how many hosts adverts may add, per address family (256: a
	// /24 fits whole, so that forged IPv4 adverts there push nobody out).
	MaxHeard int
	// MaxTold is how many addresses peers may add (256), MaxToldBy how many
	// of them one peer (32).
	MaxTold, MaxToldBy int
	// MaxConfigured is how many configured addresses are taken (64).
	MaxConfigured int
	// MaxPeers is how many proven nodes are kept (256), MaxAddrs how many
	// proven addresses of each (8).
	MaxPeers, MaxAddrs int

	// Recheck is how long a proven node is left alone (60 s).
	Recheck time.Duration
	// BackOffMin is the gap after the first dial of an address (1 s); gaps
	// double up to BackOffKnown for proven, remembered and configured
	// addresses (30 s) and up to BackOffHint for others (5 min).
	BackOffMin, BackOffKnown, BackOffHint time.Duration
	// MinGap is the least gap between dials of one address that adverts can
	// cause (5 s).
	MinGap time.Duration
	// ForgetAfter is how long a node that no longer answers is kept (30 days
	// of running time).
	ForgetAfter time.Duration

	// Rates of dials: each kind has its own, so that a flood of hints of one
	// kind delays that kind only.
	Known, Told, Heard Rate
}

// Rate is a token bucket: PerSecond dials on average, Burst at once.
type Rate struct {
	PerSecond float64
	Burst     int
}

func (c Config) withDefaults() Config {
	def(&c.Port, 7445)
	def(&c.MaxHeard, 256)
	def(&c.MaxTold, 256)
	def(&c.MaxToldBy, 32)
	def(&c.MaxConfigured, 64)
	def(&c.MaxPeers, 256)
	def(&c.MaxAddrs, 8)
	def(&c.Recheck, time.Minute)
	def(&c.BackOffMin, time.Second)
	def(&c.BackOffKnown, 30*time.Second)
	def(&c.BackOffHint, 5*time.Minute)
	def(&c.MinGap, 5*time.Second)
	def(&c.ForgetAfter, 30*24*time.Hour)
	def(&c.Known, Rate{PerSecond: 16, Burst: 32})
	def(&c.Told, Rate{PerSecond: 8, Burst: 16})
	def(&c.Heard, Rate{PerSecond: 8, Burst: 32})
	return c
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (c Config) validate() error {
	var errs []error
	bad := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("discovery: config: "+format, args...))
		}
	}
	if err := c.Tag.Validate(); err != nil {
		errs = append(errs, err)
	}
	for _, f := range []struct {
		name string
		n    int
	}{{"MaxHeard", c.MaxHeard}, {"MaxTold", c.MaxTold}, {"MaxToldBy", c.MaxToldBy}, {"MaxConfigured", c.MaxConfigured},
		{"MaxPeers", c.MaxPeers}, {"MaxAddrs", c.MaxAddrs}, {"Known.Burst", c.Known.Burst}, {"Told.Burst", c.Told.Burst}, {"Heard.Burst", c.Heard.Burst}} {
		bad(f.n > 0 && f.n <= 1<<16, "%s is %d: want 1 to 65536", f.name, f.n)
	}
	for _, f := range []struct {
		name string
		d    time.Duration
	}{{"Recheck", c.Recheck}, {"BackOffMin", c.BackOffMin}, {"MinGap", c.MinGap}, {"ForgetAfter", c.ForgetAfter}} {
		bad(f.d > 0, "%s is %s: want more than 0", f.name, f.d)
	}
	bad(c.BackOffKnown >= c.BackOffMin, "BackOffKnown %s is shorter than BackOffMin %s", c.BackOffKnown, c.BackOffMin)
	bad(c.BackOffHint >= c.BackOffMin, "BackOffHint %s is shorter than BackOffMin %s", c.BackOffHint, c.BackOffMin)
	for _, f := range []struct {
		name string
		r    float64
	}{{"Known", c.Known.PerSecond}, {"Told", c.Told.PerSecond}, {"Heard", c.Heard.PerSecond}} {
		bad(f.r > 0 && f.r <= 10_000, "%s.PerSecond is %g: want more than 0, at most 10000", f.name, f.r)
	}
	return errors.Join(errs...)
}

// New makes an empty table. The source makes jitter and choices; the same
// source and the same calls give the same answers.
func New(cfg Config, src rand.Source) (*Table, error) {
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	t := &Table{
		cfg: cfg, rng: rand.New(src),
		byAddr: map[key]*entry{}, nodes: map[nodeID]*node{},
		heardPorts: map[ipAddr][]*entry{}, toldBy: map[nodeID]int{},
	}
	for c, r := range map[class]Rate{classKnown: cfg.Known, classTold: cfg.Told, classHeard: cfg.Heard} {
		t.dialTokens[c] = bucket{rate: r, tokens: float64(r.Burst)}
	}
	for f := range t.swapTokens {
		t.swapTokens[f] = bucket{rate: Rate{PerSecond: cfg.Heard.PerSecond, Burst: cfg.Heard.Burst}, tokens: float64(cfg.Heard.Burst)}
	}
	return t, nil
}

// bucket is a token bucket on the caller's clock.
type bucket struct {
	rate   Rate
	tokens float64
	at     time.Time
}

func (b *bucket) fill(now time.Time) {
	if !b.at.IsZero() && now.After(b.at) {
		b.tokens = min(float64(b.rate.Burst), b.tokens+now.Sub(b.at).Seconds()*b.rate.PerSecond)
	}
	b.at = now
}

func (b *bucket) take(now time.Time) bool {
	b.fill(now)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// next returns when a token is there.
func (b *bucket) next(now time.Time) time.Time {
	b.fill(now)
	if b.tokens >= 1 {
		return now
	}
	return now.Add(time.Duration((1-b.tokens)/b.rate.PerSecond*float64(time.Second)) + time.Nanosecond)
}
