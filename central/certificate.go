package central

import (
	"context"
	"crypto/tls"
	"slices"
	"sync/atomic"
	"time"
)

// serverCertificate is the TLS certificate of both endpoints, renewed while
// the server runs.
type serverCertificate struct {
	ca    authority
	names []string
	now   func() time.Time
	cert  atomic.Pointer[tls.Certificate]
}

const (
	renewEvery = 24 * time.Hour
	// renewPatience is how many renewals may fail in a row: a clock that is
	// wrong for some days must not end the centre, and one that cannot renew
	// must be noticed long before its nodes notice.
	renewPatience = 30
)

func newServerCertificate(ca authority, names []string, now func() time.Time) (*serverCertificate, error) {
	slices.Sort(names)
	c := &serverCertificate{ca: ca, names: slices.Compact(names), now: now}
	return c, c.make()
}

func (c *serverCertificate) make() error {
	cert, err := c.ca.ServerCertificate(c.names, c.now())
	if err != nil {
		return err
	}
	c.cert.Store(&cert)
	return nil
}

func (c *serverCertificate) renew(ctx context.Context) error {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for failed := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err := c.make()
			if err == nil {
				failed = 0
			} else if failed++; failed == renewPatience {
				return err
			}
		}
	}
}

func (c *serverCertificate) tls(auth tls.ClientAuthType) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		ClientAuth:     auth,
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.cert.Load(), nil },
	}
}
