package peer

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/fleet"
)

// Peer is this node's end of the protocol, server and client.
type Peer struct {
	cfg Config
	// key is this node's LDevID key, port where it serves.
	key    papers.Ref
	gate   *gate
	heard  *heard
	escrow *store
	// readers bounds the reading of files for peers.
	readers *readers

	// certificate is made once: it costs a TPM signature.
	certificate func() (tls.Certificate, error)

	mu sync.Mutex
	// beside remembers which AK each node proved to have beside its EK. The
	// keys never leave the TPM they were made in, so this stays true.
	beside map[fleet.NodeID]string

	// attests bounds how many proofs are judged at once.
	attests chan struct{}
}

// New checks cfg, with every problem in the error, and opens the blobs that
// are kept.
func New(cfg Config) (*Peer, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Limits = cfg.Limits.withDefaults()
	key, err := papers.KeyRef(cfg.Signer.Public())
	if err != nil {
		return nil, fmt.Errorf("peer: LDevID key: %w", err)
	}
	p := &Peer{
		cfg: cfg, key: key, gate: newGate(cfg.Limits), heard: newHeard(), beside: map[fleet.NodeID]string{},
		attests:     make(chan struct{}, 2),
		readers:     &readers{slots: make(chan struct{}, cfg.Limits.BlobReaders), rate: cfg.Limits.BlobRate},
		certificate: onceGood(func() (tls.Certificate, error) { return bare(cfg.Signer) }),
	}
	if cfg.EscrowDir != "" {
		if p.escrow, err = openStore(cfg.EscrowDir, cfg.Limits); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// onceGood calls f until it succeeds, then keeps what it returned.
func onceGood[T any](f func() (T, error)) func() (T, error) {
	var mu sync.Mutex
	var done bool
	var v T
	return func() (T, error) {
		mu.Lock()
		defer mu.Unlock()
		if done {
			return v, nil
		}
		var err error
		if v, err = f(); err == nil {
			done = true
		}
		return v, err
	}
}

// Validate reports all problems.
func (c Config) Validate() error {
	var errs []error
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("peer: config: "+what))
		}
	}
	check(c.Self.Validate() == nil, "self is no node ID")
	check(c.Signer != nil, "signer is missing")
	check(c.Papers != nil, "papers are missing")
	check(c.Node != nil, "node is missing")
	check(c.TPM != nil, "TPM is missing")
	return errors.Join(append(errs, c.Limits.Validate())...)
}

func (l Limits) withDefaults() Limits {
	set := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	set(&l.Unproven, 512)
	set(&l.UnprovenPerSource, 16)
	set(&l.PerSource, 60)
	set(&l.Proven, 8)
	set(&l.HelloPerKey, 60)
	set(&l.ProvePerKey, 12)
	set(&l.TurnPerKey, 30)
	set(&l.BlobsPerKey, 1200)
	set(&l.BlobReaders, 4)
	set(&l.BlobsPerNode, 2)
	if l.BlobRate == 0 {
		l.BlobRate = 64 << 20
	}
	set(&l.Strangers, 600)
	set(&l.EscrowBlobs, 2)
	if l.Port == 0 {
		l.Port = Port
	}
	if l.Hello == 0 {
		l.Hello = 15 * time.Second
	}
	if l.Idle == 0 {
		l.Idle = 5 * time.Minute
	}
	if l.EscrowSize == 0 {
		l.EscrowSize = 512 << 20
	}
	if l.EscrowTotal == 0 {
		l.EscrowTotal = 4 << 30
	}
	return l
}

// Validate reports all limits that make no sense.
func (l Limits) Validate() error {
	l = l.withDefaults()
	var errs []error
	for _, f := range []struct {
		name string
		n    int64
	}{
		{"unproven", int64(l.Unproven)}, {"unproven_per_source", int64(l.UnprovenPerSource)}, {"per_source", int64(l.PerSource)},
		{"proven", int64(l.Proven)}, {"hello", int64(l.Hello)}, {"hello_per_key", int64(l.HelloPerKey)}, {"prove_per_key", int64(l.ProvePerKey)}, {"turn_per_key", int64(l.TurnPerKey)}, {"blobs_per_key", int64(l.BlobsPerKey)},
		{"blob_readers", int64(l.BlobReaders)}, {"blobs_per_node", int64(l.BlobsPerNode)}, {"blob_rate", l.BlobRate}, {"strangers", int64(l.Strangers)},
		{"idle", int64(l.Idle)}, {"escrow_blobs", int64(l.EscrowBlobs)}, {"escrow_size", l.EscrowSize}, {"escrow_total", l.EscrowTotal},
	} {
		if f.n < 0 {
			errs = append(errs, fmt.Errorf("peer: limits: %s is negative", f.name))
		}
	}
	return errors.Join(errs...)
}
