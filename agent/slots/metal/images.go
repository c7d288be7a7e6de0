package metal

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Images fetches stack versions, manifests and images. Everything is believed
// by a signature of the release key or by a digest under one.
type Images struct {
	// Dir keeps manifests, stack versions and what is half fetched.
	Dir string
	// ReleaseKeys are those of site.json.
	ReleaseKeys []crypto.PublicKey
	Arch        string
	// Parts are the devices of the disk's partitions by label.
	Parts map[string]string
	// Fetcher makes one for each transfer, with its sources and rate.
	Fetcher func() *fetch.Fetcher
	// Manifest asks somebody for an envelope.
	Manifest func(ctx context.Context, image firmware.Digest) ([]byte, error)
	// WriteSlot writes both file systems (agent/install).
	WriteSlot func(ctx context.Context, f *fetch.Fetcher, img firmware.SlotImage, root, verity disk.Device, from int64, note func(verified int64) error) error

	mu sync.Mutex
	// writing is what Write is about or was about last; boots are boot files
	// that are whole and on their way to the ESP.
	writing written
	boots   map[fetch.Digest]string
}

// written is how much of an image is in a slot.
type written struct {
	slot     firmware.SlotID
	image    firmware.Digest
	verified int64
}

func (m *Images) file(kind string, d []byte) string {
	return filepath.Join(m.Dir, kind+"-"+hex.EncodeToString(d))
}

// small returns a document that is kept, or gets it and keeps it once open
// believes it.
func (m *Images) small(name string, get func() ([]byte, error), open func([]byte) error) error {
	if b, err := os.ReadFile(name); err == nil && open(b) == nil {
		return nil
	}
	b, err := get()
	if err != nil {
		return err
	}
	if err := open(b); err != nil {
		return err
	}
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return fmt.Errorf("metal: keep a document: %w", err)
	}
	if err := renameio.WriteFile(name, b, 0o600); err != nil {
		return fmt.Errorf("metal: keep a document: %w", err)
	}
	return nil
}

// Stack returns the image of a stack version for this machine.
func (m *Images) Stack(ctx context.Context, ref fleet.StackRef, tenant string) (*fleet.ImageRef, error) {
	var v fleet.StackVersion
	err := m.small(m.file("stack", ref.SHA256), func() ([]byte, error) {
		if len(ref.SHA256) != len(fetch.Digest{}) {
			return nil, errors.New("metal: the charter names a stack version by no digest")
		}
		return m.envelope(ctx, fetch.Digest(ref.SHA256))
	}, func(b []byte) error {
		payload, err := statement.Verify(b, fleet.StackVersionPayload, m.ReleaseKeys)
		if err != nil {
			return fmt.Errorf("metal: stack version %s: %w", ref.ID(), err)
		}
		if v, err = parseStack(payload); err != nil {
			return err
		}
		if v.Tenant != tenant || v.Stack != ref.Name || v.Version != ref.Version {
			return fmt.Errorf("metal: the stack version is %s of %s, the charter asks for %s", v.ID(), v.Tenant, ref.ID())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range v.Images {
		if v.Images[i].Arch == m.Arch {
			return &v.Images[i], nil
		}
	}
	return nil, fmt.Errorf("metal: stack version %s has no image for %s", v.ID(), m.Arch)
}

// MateTime is how long one mate may take for a small file, of which a few are
// asked before the centre.
const (
	MateTime = 3 * time.Second
	fewMates = 3
)

// Few returns some mates to ask for a small file.
func Few(t *fetch.Team) []fetch.Mate {
	if t == nil {
		return nil
	}
	all := t.Mates()
	return all[:min(len(all), fewMates)]
}

// envelope fetches a blob whose size nobody said: at most that of an envelope.
func (m *Images) envelope(ctx context.Context, d fetch.Digest) ([]byte, error) {
	var problems []error
	f := m.Fetcher()
	ask := func(ctx context.Context, s fetch.Source) ([]byte, bool) {
		r, err := s.Open(ctx, d, 0, fleet.MaxEnvelope)
		if err != nil {
			problems = append(problems, err)
			return nil, false
		}
		b, err := io.ReadAll(io.LimitReader(r, fleet.MaxEnvelope+1))
		_ = r.Close()
		if err == nil && sum(b) == d {
			return b, true
		}
		problems = append(problems, fmt.Errorf("metal: %s sent something else: %w", s.Name(), errors.Join(err)))
		return nil, false
	}
	for _, s := range Few(f.Team) {
		mctx, cancel := context.WithTimeout(ctx, MateTime)
		b, ok := ask(mctx, s)
		cancel()
		if ok {
			return b, nil
		}
	}
	for _, s := range f.Sources() {
		if b, ok := ask(ctx, s); ok {
			return b, nil
		}
	}
	return nil, errors.Join(append([]error{errors.New("metal: nobody has the stack version")}, problems...)...)
}

// read returns the manifest of an image.
func (m *Images) read(ctx context.Context, image firmware.Digest) (firmware.Manifest, error) {
	var x firmware.Manifest
	err := m.small(m.file("manifest", image[:]), func() ([]byte, error) { return m.Manifest(ctx, image) }, func(b []byte) (err error) {
		if x, err = firmware.OpenManifest(b, m.ReleaseKeys); err != nil {
			return err
		}
		if x.SHA256 != image || x.Kind != fleet.ImageSlot || x.Slot == nil || x.Arch != m.Arch {
			return fmt.Errorf("metal: the manifest is that of another image: %s %s for %s", x.Kind, x.SHA256, x.Arch)
		}
		return nil
	})
	return x, err
}

// Target is slots.Config.Target.
func (m *Images) Target(ctx context.Context, ref fleet.ImageRef) (firmware.Target, error) {
	if len(ref.SHA256) != len(firmware.Digest{}) {
		return firmware.Target{}, errors.New("metal: an image without digest")
	}
	x, err := m.read(ctx, firmware.Digest(ref.SHA256))
	if err != nil {
		return firmware.Target{}, err
	}
	return firmware.Target{Image: x.SHA256, Name: x.Name, Version: x.Version, Entry: x.Entry(), Size: x.Slot.WriteSize(), BootSize: x.Size,
		K3s: x.Slot.K3s, Etcd: x.Slot.EtcdMinor}, nil
}

// Write implements slots.Images.
func (m *Images) Write(ctx context.Context, slot firmware.SlotID, image firmware.Digest, from int64, note func(int64) error) (err error) {
	x, err := m.read(ctx, image)
	if err != nil {
		return err
	}
	r, v := firmware.RootLabels(slot)
	root, err := disk.Open(m.Parts[r])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	verity, err := disk.Open(m.Parts[v])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, verity.Close()) }()
	tell := func(verified int64) {
		m.mu.Lock()
		m.writing = written{slot, image, verified}
		m.mu.Unlock()
	}
	tell(from)
	return m.WriteSlot(ctx, m.Fetcher(), *x.Slot, root, verity, from, func(verified int64) error {
		tell(verified)
		return note(verified)
	})
}

// Boot implements slots.Images: the boot file goes through a file on the data
// partition, so that a broken line costs nothing.
func (m *Images) Boot(ctx context.Context, image firmware.Digest) (io.ReadCloser, error) {
	x, err := m.read(ctx, image)
	if err != nil {
		return nil, err
	}
	m.tidy(image)
	name := m.file("boot", image[:])
	s, err := fetch.OpenFile(name)
	if err != nil {
		return nil, err
	}
	if err := m.Fetcher().Whole(ctx, fetch.Blob{Digest: image, Size: x.Size}, s); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	m.mu.Lock()
	if m.boots == nil {
		m.boots = map[fetch.Digest]string{}
	}
	m.boots[image] = name
	m.mu.Unlock()
	return &whole{s.Reader(), s, name, func() {
		m.mu.Lock()
		delete(m.boots, image)
		m.mu.Unlock()
	}}, nil
}

// tidy removes boot files of other images that were never fetched whole.
func (m *Images) tidy(image firmware.Digest) {
	all, err := os.ReadDir(m.Dir)
	if err != nil {
		return
	}
	for _, f := range all {
		if strings.HasPrefix(f.Name(), "boot-") && f.Name() != filepath.Base(m.file("boot", image[:])) {
			_ = os.Remove(filepath.Join(m.Dir, f.Name())) // it only takes room
		}
	}
}

// whole is a fetched file that goes away when it is closed.
type whole struct {
	io.Reader
	f    *fetch.File
	name string
	gone func()
}

// Close implements io.Closer.
func (w *whole) Close() error {
	w.gone()
	return errors.Join(w.f.Close(), os.Remove(w.name))
}
