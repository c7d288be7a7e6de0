package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// Files of a run beside the image and the centre's data directory.
const (
	releaseKey = "release.key"
	rootCA     = "public/root-ca.pem"
	ordersKey  = "public/orders.pub.pem"
	vendorRoot = "tpm-vendor-root.pem"
)

func centreDir(l *lab.Lab) string { return l.Path(CentreDir) }

// centre is the real `muster serve`, as a child process in the lab.
type centre struct {
	l *lab.Lab
	// name is for people and of the log file; dir is the data directory.
	name, dir string
	// boot gives it the boot role, too.
	boot bool

	mu    sync.Mutex
	child *lab.Child
	// down is set while the centre is meant to be away; back is closed and
	// replaced when it answers again.
	down bool
	back chan struct{}
}

// muster runs a command that talks to the centre.
func (c *centre) muster(ctx context.Context, args ...string) ([]byte, error) {
	return c.l.Muster(ctx, append(args, "--data", c.dir)...)
}

// startCentre starts the centre and waits until it answers. With boot it has
// the boot role, too.
func startCentre(ctx context.Context, l *lab.Lab, boot bool) (*centre, error) {
	c := &centre{l: l, name: "centre", dir: centreDir(l), boot: boot, back: make(chan struct{})}
	return c, c.start(ctx)
}

// start starts a centre that does not run, with what it has on its disk.
func (c *centre) start(ctx context.Context) error {
	l := c.l
	args := []string{"serve", "--data", c.dir, "--advertise", lab.BootHost, "--release-key", l.Path(releaseKey + ".pub")}
	if c.boot {
		args = append(args, "--boot-interface", lab.Bridge, "--boot-mode", l.Spec.DHCP, "--boot-address", lab.BootHost+"/24",
			"--boot-image", imageDir(l))
		if l.Spec.Boot == machine.BootHTTPS {
			args = append(args, "--boot-https", ":7481", "--boot-https-only")
		}
		if l.Spec.DHCP == lab.DHCPFull {
			args = append(args, "--boot-range", lab.LeaseFrom+"-"+lab.LeaseTo)
		}
	}
	child, err := l.Start(c.name, args...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err = poll(ctx, 300*time.Millisecond, func() (bool, error) {
		select {
		case <-child.Done():
			return false, child.Err()
		default:
		}
		_, err := c.requests(ctx)
		return err == nil, nil
	})
	if err != nil {
		return fmt.Errorf("scenario: wait for the %s: %w", c.name, err)
	}
	c.mu.Lock()
	c.child, c.down = child, false
	close(c.back)
	c.back = make(chan struct{})
	c.mu.Unlock()
	l.Say(c.name, "ready", "muster serve answers operators and nodes")
	return nil
}

// kill ends the centre as a power failure does, until start.
func (c *centre) kill() {
	c.mu.Lock()
	c.down = true
	child := c.child
	c.mu.Unlock()
	child.Kill()
	c.l.Say(c.name, "killed", "the centre is killed (kill -9)")
}

// stop ends the centre and wants it to end well.
func (c *centre) stop() error {
	c.mu.Lock()
	c.down = true
	child := c.child
	c.mu.Unlock()
	select {
	case <-child.Done():
		return child.Err()
	default:
	}
	child.Stop(20 * time.Second)
	return child.Clean()
}

// alive stops f, with the reason, when the centre ends unasked.
func (c *centre) alive(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for {
			c.mu.Lock()
			child, down, back := c.child, c.down, c.back
			c.mu.Unlock()
			ended := child.Done()
			if down {
				ended = nil
			}
			select {
			case <-ended:
				c.mu.Lock()
				down = c.down
				c.mu.Unlock()
				if !down {
					cancel(child.Err())
					return
				}
			case <-back:
			case <-ctx.Done():
				return
			}
		}
	}()
	err := f(ctx)
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w (%w)", cause, err)
	}
	return err
}

// requests is `muster get requests`.
func (c *centre) requests(ctx context.Context) ([]fleet.Request, error) {
	b, err := c.muster(ctx, "get", "requests", "-o", "json")
	if err != nil {
		return nil, err
	}
	var out []fleet.Request
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("scenario: read requests: %w", err)
	}
	return out, nil
}

// nodes is `muster get nodes`.
func (c *centre) nodes(ctx context.Context) ([]fleet.Node, error) {
	b, err := c.muster(ctx, "get", "nodes", "-o", "json")
	if err != nil {
		return nil, err
	}
	var out []fleet.Node
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("scenario: read nodes: %w", err)
	}
	return out, nil
}

// requestOf returns the newest request of the machine with this SMBIOS UUID.
// A UUID is a claim; in a lab that made the machine it is good enough to tell
// machines apart.
func requestOf(list []fleet.Request, uuid string) (fleet.Request, bool) {
	var found fleet.Request
	ok := false
	for _, r := range list {
		if sameUUID(r.Evidence.UUID, uuid) && (!ok || r.FirstSeen.After(found.FirstSeen)) {
			found, ok = r, true
		}
	}
	return found, ok
}

func sameUUID(a, b string) bool {
	clean := func(s string) string {
		var out []byte
		for _, c := range []byte(s) {
			switch {
			case c >= '0' && c <= '9', c >= 'a' && c <= 'f':
				out = append(out, c)
			case c >= 'A' && c <= 'F':
				out = append(out, c+'a'-'A')
			}
		}
		return string(out)
	}
	return clean(a) != "" && clean(a) == clean(b)
}

// waitRequest polls until the machine's request fits.
func (c *centre) waitRequest(ctx context.Context, uuid string, fits func(fleet.Request) bool) (fleet.Request, error) {
	var got fleet.Request
	var last error
	err := poll(ctx, time.Second, func() (bool, error) {
		list, err := c.requests(ctx)
		if last = err; err != nil {
			return false, nil // a busy moment; the context ends it
		}
		r, ok := requestOf(list, uuid)
		got = r
		return ok && fits(r), nil
	})
	if err != nil {
		return got, fmt.Errorf("%w (last answer: %w)", err, last)
	}
	return got, nil
}

// introduce makes the centre know what it should: the run's TPM vendor, as a
// lab root, and the image.
func (c *centre) introduce(ctx context.Context) error {
	authority, err := swtpmtest.OpenCA(c.l.Authority(), false)
	if err != nil {
		return fmt.Errorf("scenario: read EK authority: %w", err)
	}
	if err := os.WriteFile(c.l.Path(vendorRoot), authority.RootPEM(), 0o644); err != nil {
		return fmt.Errorf("scenario: write EK authority's root: %w", err)
	}
	if _, err := c.muster(ctx, "roots", "import", "--lab", c.l.Path(vendorRoot)); err != nil {
		return fmt.Errorf("scenario: import lab root: %w", err)
	}
	if _, err := c.muster(ctx, "image", "register", imageDir(c.l)); err != nil {
		return fmt.Errorf("scenario: register image: %w", err)
	}
	c.l.Say("centre", "introduced", "the lab's TPM vendor is imported as a lab root, the image is registered")
	return nil
}

// openWindow lets so many unknown machines boot beside another DHCP server.
func (c *centre) openWindow(ctx context.Context, count int) error {
	if _, err := c.muster(ctx, "boot", "window", "open", "--for", "1h", "--count", fmt.Sprint(count)); err != nil {
		return fmt.Errorf("scenario: open boot window: %w", err)
	}
	c.l.Say("centre", "window", fmt.Sprintf("a person lets %d unknown machine(s) boot", count))
	return nil
}

// poll asks until ask is true or an error, at least every interval.
func poll(ctx context.Context, every time.Duration, ask func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		ok, err := ask()
		if ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// prepareEnroll makes what a centre's operator makes once: the CA, the
// release key, and an image that trusts both.
func prepareEnroll(ctx context.Context, l *lab.Lab) error {
	if l.Spec.Image != "" {
		return &lab.UsageError{Err: errors.New("scenario: --image is for the scenario boot: this one needs an image that trusts its own centre")}
	}
	if _, err := l.Muster(ctx, "release", "keygen", "--out", l.Path(releaseKey)); err != nil {
		return fmt.Errorf("scenario: make release key: %w", err)
	}
	if _, err := l.Muster(ctx, "ca", "init", "--data", centreDir(l)); err != nil {
		return fmt.Errorf("scenario: make CA: %w", err)
	}
	if _, err := l.Muster(ctx, "ca", "export", "--data", centreDir(l), "--out", l.Path("public")); err != nil {
		return fmt.Errorf("scenario: export public keys: %w", err)
	}
	return buildImage(ctx, l, "--centre", "https://"+lab.BootHost+":7444", "--root-ca", l.Path(rootCA),
		"--orders-key", l.Path(ordersKey), "--release-key", l.Path(releaseKey))
}

// served is the directory that the boot host serves from.
func served(l *lab.Lab) (string, error) {
	if !l.Spec.Forged {
		return imageDir(l), nil
	}
	dir := l.Path("forged")
	return dir, forge(filepath.Join(dir, filepath.Base(imageFile(l))), imageFile(l))
}
