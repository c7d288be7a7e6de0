package mdns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/muster-edge/muster/discovery"
)

// Config says what to advertise and where.
type Config struct {
	// Tag is our site's. Required; adverts of other sites give no hints.
	Tag discovery.SiteTag
	// Port is where our peers' API listens (7445).
	Port uint16
	// Use picks interfaces by name; nil means Usable. Only interfaces that
	// are up, have a carrier and can multicast are asked for, never loopback
	// or point-to-point ones.
	Use func(name string) bool
	// Queue is how many hints wait for Wait at most (1024).
	Queue int
	// Rescan is how often interfaces are looked at without the kernel having
	// told of a change (10 s).
	Rescan time.Duration
	// Source gives jitter and the instance label; nil means a random seed.
	Source rand.Source
	// Log gets changes of links and errors; nil means none.
	Log *slog.Logger
}

func (c *Config) validate() error {
	var errs []error
	if err := c.Tag.Validate(); err != nil {
		errs = append(errs, err)
	}
	if c.Queue < 1 || c.Queue > 1<<16 {
		errs = append(errs, fmt.Errorf("mdns: config: Queue is %d: want 1 to 65536", c.Queue))
	}
	if c.Rescan < 10*time.Millisecond {
		errs = append(errs, fmt.Errorf("mdns: config: Rescan is %s: want at least 10ms", c.Rescan))
	}
	return errors.Join(errs...)
}

// Usable is the default choice of interfaces: all but those that container
// networks make, where only our own pods would listen.
func Usable(name string) bool {
	for _, p := range []string{"cni", "flannel", "veth", "docker", "br-", "cali", "cilium", "lxc", "kube-", "nodelocaldns", "virbr", "wg", "tun", "tap"} {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	return true
}

// Service advertises and listens while Run runs.
type Service struct {
	cfg   Config
	label string
	rng   *rand.Rand
	log   *slog.Logger

	in      chan packet
	hints   *queue
	links   map[linkKey]*link
	c       counters
	running atomic.Bool
	// lose is a test's bad network: packets for which it returns true were
	// never received.
	lose func([]byte) bool
}

// New checks the configuration. Nothing is opened before Run.
func New(cfg Config) (*Service, error) {
	if cfg.Port == 0 {
		cfg.Port = 7445
	}
	if cfg.Use == nil {
		cfg.Use = Usable
	}
	if cfg.Queue == 0 {
		cfg.Queue = 1024
	}
	if cfg.Rescan == 0 {
		cfg.Rescan = 10 * time.Second
	}
	if cfg.Source == nil {
		cfg.Source = rand.NewPCG(rand.Uint64(), rand.Uint64())
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	rng := rand.New(cfg.Source)
	return &Service{
		cfg: cfg, rng: rng, log: cfg.Log, label: discovery.NewLabel(rng),
		in: make(chan packet, maxPackets), hints: newQueue(cfg.Queue), links: map[linkKey]*link{},
	}, nil
}

// Wait returns the hints heard since the last call, and blocks while there are
// none. Of several about one address the last one counts, so a slow caller
// loses nothing that matters.
func (s *Service) Wait(ctx context.Context) ([]discovery.Hint, error) { return s.hints.wait(ctx) }
