package k3s

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// MaxFsync is the p99 of flushing a small write above which a node is not made
// a server. etcd flushes its log before it answers, on a majority of the
// servers; its authors ask for 10 ms. k3s gives a heartbeat 500 ms and an
// election 5 s, so that a server may be far slower before the cluster loses
// its leader; but from 100 ms on, etcd calls each write slow, and one heartbeat
// in five would wait for the disk. An SSD needs 1-5 ms, a bad SD card seconds.
const MaxFsync = 100 * time.Millisecond

const (
	fsyncWrites = 200
	fsyncSize   = 8 << 10 // a log record of a Kubernetes object
	fsyncLimit  = 20 * time.Second
)

// Fit reports why this node cannot become a server by x (ErrUnfit), or nil:
// version, critical settings, speed of the disk. The tokens in x may be empty,
// so that it can be asked before anybody sends them.
func (m *Manager) Fit(ctx context.Context, x Material, b fleet.BirthSettings) error {
	if x.As != clusterbootstrap.RoleServer {
		return fmt.Errorf("%w: the material is that of a %s", ErrUnfit, x.As)
	}
	v, err := m.Version(ctx)
	if err != nil {
		return err
	}
	var errs []error
	if v != x.Version {
		errs = append(errs, fmt.Errorf("%w: its k3s is %s, that of the server is %.80s", ErrUnfit, v, x.Version))
	}
	if d := CriticalDigest(b); d != x.Critical {
		errs = append(errs, fmt.Errorf("%w: its charter has other birth settings than the server's", ErrUnfit))
	}
	p99, err := Fsync(ctx, m.cfg.Paths.Data)
	switch {
	case err != nil:
		errs = append(errs, err)
	case p99 > MaxFsync:
		errs = append(errs, fmt.Errorf("%w: its disk takes %s to flush a write (p99), more than %s", ErrUnfit, p99.Round(time.Millisecond), MaxFsync))
	}
	return errors.Join(errs...)
}

// Fsync measures how long dir's file system takes to flush a small write: the
// 99th percentile of 200, written one after the other into a file whose space
// is already there, as etcd does. A disk too slow to finish in 20 s gets the
// worst that was seen.
func Fsync(ctx context.Context, dir string) (time.Duration, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, fmt.Errorf("k3s: measure disk: %w", err)
	}
	f, err := os.CreateTemp(dir, ".muster-fsync-*")
	if err != nil {
		return 0, fmt.Errorf("k3s: measure disk: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	fail := func(err error) (time.Duration, error) {
		return 0, fmt.Errorf("k3s: measure disk %s: %w", filepath.Dir(f.Name()), err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, fsyncWrites*fsyncSize); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	b := make([]byte, fsyncSize)
	began := time.Now()
	var took []time.Duration
	for i := range fsyncWrites {
		if err := ctx.Err(); err != nil {
			return fail(err)
		}
		b[0] = byte(i)
		if _, err := f.WriteAt(b, int64(i)*fsyncSize); err != nil {
			return fail(err)
		}
		t := time.Now()
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return fail(err)
		}
		took = append(took, time.Since(t))
		if time.Since(began) > fsyncLimit {
			break
		}
	}
	return percentile99(took), nil
}

// diskSpeed is the last measurement. It is taken beside everything else, since
// a slow disk takes long to show it.
type diskSpeed struct {
	mu   sync.Mutex
	busy bool
	at   time.Duration // CLOCK_BOOTTIME; 0: never
	p99  time.Duration
}

const (
	// measureEvery is how often the disk is measured: they age.
	measureEvery = 24 * time.Hour
	// measureAgain is when one is measured again that was too slow for a server:
	// a box that has just started has other things to do with its disk, and must
	// not be called unfit for a day because of that.
	measureAgain = 2 * time.Minute
)

// due says whether the disk is to be measured, at a time.
func (d *diskSpeed) due(now time.Duration) bool {
	if d.at == 0 {
		return true
	}
	if d.p99 > MaxFsync {
		return now-d.at > measureAgain
	}
	return now-d.at > measureEvery
}

// fsync returns what is known of the disk, and sees that something will be.
// While the datastore is in use nothing is measured: it would be disturbed.
func (m *Manager) fsync(serving bool) time.Duration {
	d := &m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	now := m.cfg.Boottime()
	if !d.busy && !serving && d.due(now) {
		d.busy = true
		go func() {
			p99, err := Fsync(context.Background(), m.cfg.Paths.Data)
			if err != nil {
				m.cfg.Log.Warn("measure the disk", "err", err)
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.busy, d.at, d.p99 = false, m.cfg.Boottime(), p99
		}()
	}
	return d.p99
}

// percentile99 is the smallest value that 99 of 100 do not exceed.
func percentile99(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[(len(d)*99+99)/100-1]
}
