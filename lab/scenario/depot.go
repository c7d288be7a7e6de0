package scenario

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/lab"
)

// The depot keeps between runs what is slow to make and the same each time: an
// operator's keys, which are part of every image, and the images. Each thing
// lies in a folder that is named by a digest over all that went into it, so
// that nothing in it is ever out of date.

const (
	// depotKept is how many things of a kind stay; others go when they were not
	// used for depotAge.
	depotKept = 6
	depotAge  = 72 * time.Hour
	// keysAge is when an operator's keys are made anew: certificates in there
	// end one day.
	keysAge = 14 * 24 * time.Hour
)

func depotDir() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("scenario: find the cache directory: %w", err)
	}
	return filepath.Join(cache, "muster", "lab"), nil
}

// kept returns the folder of a thing, and lets build make it if it is not
// there. What one run makes another may use at the same time.
func kept(l *lab.Lab, kind, digest string, build func(dir string) error) (string, error) {
	depot, err := depotDir()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(depot, 0o700); err != nil {
		return "", fmt.Errorf("scenario: make the depot: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(depot, kind+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("scenario: open the depot: %w", err)
	}
	defer lock.Close() // and with it the lock ends
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("scenario: lock the depot: %w", err)
	}
	dir := filepath.Join(depot, kind+"-"+digest[:16])
	now := time.Now()
	if _, err := os.Stat(dir); err == nil {
		_ = os.Chtimes(dir, now, now) // used
		l.Note("lab", "depot", "taking "+dir)
		return dir, nil
	}
	tmp, err := os.MkdirTemp(depot, kind+".new-")
	if err != nil {
		return "", fmt.Errorf("scenario: make %s: %w", kind, err)
	}
	defer os.RemoveAll(tmp) // nothing is there if it was renamed
	if err := build(tmp); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", fmt.Errorf("scenario: keep %s: %w", kind, err)
	}
	tidy(depot, kind, now)
	return dir, nil
}

// tidy removes what nobody used for long, and what a killed run left.
func tidy(depot, kind string, now time.Time) {
	entries, err := os.ReadDir(depot)
	if err != nil {
		return
	}
	type thing struct {
		dir  string
		used time.Time
	}
	var all []thing
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !e.IsDir() {
			continue
		}
		switch {
		case strings.HasPrefix(e.Name(), kind+"-"):
			all = append(all, thing{filepath.Join(depot, e.Name()), info.ModTime()})
		case strings.HasPrefix(e.Name(), kind+".new-") && now.Sub(info.ModTime()) > depotAge:
			_ = os.RemoveAll(filepath.Join(depot, e.Name()))
		}
	}
	slices.SortFunc(all, func(a, b thing) int { return b.used.Compare(a.used) })
	for i, t := range all {
		if i >= depotKept && now.Sub(t.used) > depotAge {
			_ = os.RemoveAll(t.dir)
		}
	}
}

// inputs is a digest over named texts and files.
type inputs struct {
	lines []string
	errs  []error
}

func (i *inputs) text(name, value string) { i.lines = append(i.lines, name+" "+value) }

func (i *inputs) file(name, path string) {
	f, err := os.Open(path)
	if err != nil {
		i.errs = append(i.errs, err)
		return
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		i.errs = append(i.errs, err)
	}
	i.text(name, hex.EncodeToString(h.Sum(nil)))
}

func (i *inputs) digest() (string, error) {
	if err := errors.Join(i.errs...); err != nil {
		return "", fmt.Errorf("scenario: read what goes into an image: %w", err)
	}
	sum := sha256.Sum256([]byte(strings.Join(i.lines, "\n")))
	return hex.EncodeToString(sum[:]), nil
}

// escrowKeyFile is the operator's, in the run's directory.
const escrowKeyFile = "escrow.key"

// operatorKeys puts an operator's keys and a centre that has its CA into the
// run's directory: those of earlier runs, since images carry them.
func operatorKeys(ctx context.Context, l *lab.Lab) error {
	period := time.Now().Unix() / int64(keysAge/time.Second)
	in := &inputs{}
	in.text("format", "1")
	in.text("period", fmt.Sprint(period))
	digest, err := in.digest()
	if err != nil {
		return err
	}
	dir, err := kept(l, "keys", digest, func(dir string) error {
		for _, args := range [][]string{
			{"release", "keygen", "--out", filepath.Join(dir, releaseKey)},
			{"escrow", "keygen", "--out", filepath.Join(dir, escrowKeyFile)},
			{"ca", "init", "--data", filepath.Join(dir, CentreDir)},
			{"ca", "export", "--data", filepath.Join(dir, CentreDir), "--out", filepath.Join(dir, "public")},
		} {
			if _, err := l.Muster(ctx, args...); err != nil {
				return fmt.Errorf("scenario: make an operator's keys: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := copyTree(l.Dir, dir); err != nil {
		return fmt.Errorf("scenario: take an operator's keys: %w", err)
	}
	return nil
}

// copyTree copies files and folders into a directory, with their modes.
func copyTree(to, from string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil || rel == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		at := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(at, info.Mode().Perm())
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(at, b, info.Mode().Perm())
	})
}

// trust are the arguments that say whom an image trusts.
func trust(l *lab.Lab) []string {
	return []string{"--centre", "https://" + lab.BootHost + ":7444", "--root-ca", l.Path(rootCA), "--orders-key", l.Path(ordersKey), "--release-key", l.Path(releaseKey)}
}

// trusted adds what trust names to what goes into an image.
func (i *inputs) trusted(l *lab.Lab) {
	i.file("muster", l.Spec.Program)
	i.file("node", l.Spec.NodeProgram)
	i.file("root", l.Path(rootCA))
	i.file("orders", l.Path(ordersKey))
	i.file("release", l.Path(releaseKey))
}

// keptRecovery puts the recovery image into the run's directory.
func keptRecovery(ctx context.Context, l *lab.Lab) error {
	began := time.Now()
	in := &inputs{}
	in.trusted(l)
	in.text("secure boot", fmt.Sprint(l.Spec.SecureBoot))
	digest, err := in.digest()
	if err != nil {
		return err
	}
	dir, err := kept(l, "recovery", digest, func(dir string) error {
		if err := buildImage(ctx, l, trust(l)...); err != nil {
			return err
		}
		return copyTree(dir, imageDir(l))
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(imageDir(l), 0o755); err != nil {
		return fmt.Errorf("scenario: take the recovery image: %w", err)
	}
	l.Timing("", "image_build_s", time.Since(began))
	if err := copyTree(imageDir(l), dir); err != nil {
		return fmt.Errorf("scenario: take the recovery image: %w", err)
	}
	return nil
}

// slotSpec says which slot image is wanted.
type slotSpec struct {
	// version of the image and of the stack that holds it.
	version string
	// files come over the root, by their path, beside those of every slot in the
	// lab; a file that begins with "#!" may be executed.
	files map[string]string
	// noK3s leaves k3s out.
	noK3s bool
}

// slotDir is where the run finds the files of a slot image.
func slotDir(l *lab.Lab, version string) string { return l.Path("slot-" + version) }

// slotImageName is that of all slot images in the lab.
const slotImageName = "edge"

// labFiles are in every slot in the lab: what the system says goes to the
// serial console, where scenarios read it, and the stand-in for k3s starts
// only where somebody said that this is a lab.
func labFiles(l *lab.Lab) map[string]string {
	out := map[string]string{
		"etc/systemd/journald.conf.d/90-lab.conf": "[Journal]\nForwardToConsole=yes\nTTYPath=/dev/console\nMaxLevelConsole=info\n",
	}
	if l.Spec.StandIn {
		const text = "[Service]\nEnvironment=LAB_STANDIN=1\n"
		out["etc/systemd/system/muster-k3s.service.d/90-lab.conf"] = text
		out["etc/systemd/system/muster-agent.service.d/90-lab.conf"] = text
	}
	return out
}

// slotImage builds a slot image with `muster image slot`, or takes the one of
// an earlier run with the same inputs. Its files are at slotDir afterwards.
// It may need the internet, so it belongs into a scenario's preparation.
func slotImage(ctx context.Context, l *lab.Lab, s slotSpec) error {
	began := time.Now()
	files := labFiles(l)
	for name, text := range s.files {
		files[name] = text
	}
	in := &inputs{}
	in.trusted(l)
	in.text("version", s.version)
	in.text("secure boot", fmt.Sprint(l.Spec.SecureBoot))
	if !s.noK3s {
		in.file("k3s", l.Spec.K3s)
	}
	names := make([]string, 0, len(files))
	for name, text := range files {
		names = append(names, name)
		sum := sha256.Sum256([]byte(text))
		in.text("file "+name, hex.EncodeToString(sum[:]))
	}
	slices.Sort(names)
	slices.Sort(in.lines)
	digest, err := in.digest()
	if err != nil {
		return err
	}
	dir, err := kept(l, "slot", digest, func(dir string) error {
		l.Say("lab", "slot-image", fmt.Sprintf("building the system %s@%s (half a minute; the first time fetches its packages)", slotImageName, s.version))
		overlay := l.Path("overlay-" + s.version)
		for _, name := range names {
			mode := fs.FileMode(0o644)
			if strings.HasPrefix(files[name], "#!") {
				mode = 0o755
			}
			at := filepath.Join(overlay, name)
			if err := cmp.Or(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(files[name]), mode)); err != nil {
				return fmt.Errorf("scenario: write overlay: %w", err)
			}
		}
		args := append([]string{"slot", "--out", dir, "--name", slotImageName, "--image-version", s.version, "--kernel", "cloud",
			"--node-binary", l.Spec.NodeProgram, "--overlay", overlay}, trust(l)...)
		if !s.noK3s {
			args = append(args, "--k3s", l.Spec.K3s)
		}
		return musterImage(ctx, l, "slot image", args...)
	})
	if err != nil {
		return err
	}
	if err := os.Symlink(dir, slotDir(l, s.version)); err != nil {
		return fmt.Errorf("scenario: take the slot image: %w", err)
	}
	l.Timing("", "slot_image_s", time.Since(began))
	return nil
}

// publish sends a slot image to the centre and makes a stack version of it, as
// an operator does. The stack version is named like the image.
func (c *centre) publish(ctx context.Context, version string) error {
	l := c.l
	dir := slotDir(l, version)
	if _, err := c.muster(ctx, "image", "push", dir); err != nil {
		return fmt.Errorf("scenario: send the slot image: %w", err)
	}
	text := fmt.Sprintf("stack: %s\nversion: %q\nimages:\n  - manifest: %s\n", stackName, version,
		filepath.Join(filepath.Base(dir), fmt.Sprintf("%s-%s-amd64.manifest", slotImageName, version)))
	file := l.Path("stack-" + version)
	if err := os.WriteFile(file+".yaml", []byte(text), 0o644); err != nil {
		return fmt.Errorf("scenario: write stack: %w", err)
	}
	if _, err := l.Muster(ctx, "release", "stack", file+".yaml", "--key", l.Path(releaseKey), "--out", file+".signed"); err != nil {
		return fmt.Errorf("scenario: sign stack: %w", err)
	}
	if _, err := c.muster(ctx, "stack", "publish", file+".signed"); err != nil {
		return fmt.Errorf("scenario: publish stack: %w", err)
	}
	l.Say("centre", "published", fmt.Sprintf("stack %s@%s is published, its image %s@%s is at the centre", stackName, version, slotImageName, version))
	return nil
}

// stackName is the stack that the lab's sites run.
const stackName = "shop"

// assign says which version the site shall run from now on.
func (c *centre) assign(ctx context.Context, version string) error {
	if _, err := c.muster(ctx, "assign", site, "--stack", stackName+"@"+version, "--reason", "the lab's site"); err != nil {
		return fmt.Errorf("scenario: assign stack: %w", err)
	}
	c.l.Say("centre", "assigned", fmt.Sprintf("site %s shall run %s@%s", site, stackName, version))
	return nil
}
