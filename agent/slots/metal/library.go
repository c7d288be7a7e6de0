package metal

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
)

// Library is what this node has for its peers (peer.Blobs): the systems in its
// slots, read back from where they are, and the signed documents about them.
// Nothing is kept twice, and nothing leaves without having been compared with
// its digest: a medium that forgets costs the node its say, nobody else a
// broken system.
type Library struct {
	Images *Images
	// Slots are what the record says about the slots.
	Slots func() [2]firmware.Slot
	// ESP is where the EFI system partition is mounted.
	ESP string
	// Team knows what this node is fetching.
	Team *fetch.Team

	mu sync.Mutex
	// manifests that were opened; proved is when a file without chunks was
	// last read whole and found right.
	manifests map[firmware.Digest]*firmware.Manifest
	proved    map[fetch.Digest]proof
}

type proof struct {
	at   time.Time
	size int64
	mod  time.Time
}

const (
	// provedFor is how long a file that was read whole is not read whole again.
	provedFor = time.Minute
	// maxOpened bounds manifests that are kept open.
	maxOpened = 8
	// pieceSize is what is read of a file without chunks at a time.
	pieceSize = 1 << 20
)

// item is one file that is here.
type item struct {
	path string
	// have is how much of it is here, size all of it.
	have, size int64
	// chunks are digests of firmware.ChunkSize bytes each; none: the file is
	// known by its own.
	chunks []firmware.Digest
}

// manifest returns one that is kept on the disk.
func (l *Library) manifest(image firmware.Digest) *firmware.Manifest {
	l.mu.Lock()
	defer l.mu.Unlock()
	if x := l.manifests[image]; x != nil {
		return x
	}
	b, err := os.ReadFile(l.Images.file("manifest", image[:]))
	if err != nil {
		return nil
	}
	x, err := firmware.OpenManifest(b, l.Images.ReleaseKeys)
	if err != nil || x.SHA256 != image || x.Slot == nil {
		return nil
	}
	if l.manifests == nil || len(l.manifests) >= maxOpened {
		l.manifests = map[firmware.Digest]*firmware.Manifest{}
	}
	l.manifests[image] = &x
	return &x
}

// find looks for a file in the slots, on the ESP and among the documents.
func (l *Library) find(d fetch.Digest) (item, bool) {
	l.Images.mu.Lock()
	w, boot := l.Images.writing, l.Images.boots[d]
	l.Images.mu.Unlock()
	record := l.Slots()
	for _, id := range []firmware.SlotID{firmware.SlotA, firmware.SlotB} {
		s := record[id]
		image, verified := s.Image, int64(0)
		switch {
		case w.slot == id && !w.image.IsZero() && (s.State == firmware.SlotWriting || w.image == s.Image):
			image, verified = w.image, w.verified
		case s.State == firmware.SlotWriting || s.State == firmware.SlotEmpty:
			continue
		default:
			verified = 1 << 62
		}
		m := l.manifest(image)
		if m == nil {
			continue
		}
		r, v := firmware.RootLabels(id)
		switch firmware.Digest(d) {
		case m.Slot.Root.SHA256:
			if have := min(verified, m.Slot.Root.Size); have > 0 {
				return item{path: l.Images.Parts[r], have: have, size: m.Slot.Root.Size, chunks: m.Slot.Chunks}, true
			}
		case m.Slot.Verity.SHA256:
			if verified >= m.Slot.WriteSize() {
				return item{path: l.Images.Parts[v], have: m.Slot.Verity.Size, size: m.Slot.Verity.Size}, true
			}
		case m.SHA256:
			if boot != "" {
				return item{path: boot, have: m.Size, size: m.Size}, true
			}
			if p, ok := l.bootFile(m); ok {
				return item{path: p, have: m.Size, size: m.Size}, true
			}
		}
	}
	name := l.Images.file("stack", d[:])
	if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() && fi.Size() <= fleet.MaxEnvelope {
		return item{path: name, have: fi.Size(), size: fi.Size()}, true
	}
	return item{}, false
}

// bootFile finds the boot file of an image on the ESP, under whatever name.
func (l *Library) bootFile(m *firmware.Manifest) (string, bool) {
	files, err := efi.NewESP(l.ESP).BootFiles()
	if err != nil {
		return "", false
	}
	for _, f := range files {
		if f.Base != m.Entry() && f.Name != firmware.StagedPrefix+m.Entry() {
			continue
		}
		full := filepath.Join(l.ESP, filepath.FromSlash(bootmodel.Entries), f.Name)
		if fi, err := os.Lstat(full); err == nil && fi.Mode().IsRegular() && fi.Size() == m.Size {
			return full, true
		}
	}
	return "", false
}

// Standing implements peer.Blobs.
func (l *Library) Standing(d fetch.Digest) fetch.Standing {
	st := l.Team.Standing(d)
	if x, ok := l.find(d); ok {
		if st.Have = x.have; x.have == x.size {
			st.Wants, st.Direct = false, false
		}
		l.Team.Asked(time.Now(), d)
	}
	return st
}

// Read implements peer.Blobs.
func (l *Library) Read(ctx context.Context, d fetch.Digest, off int64) ([]byte, error) {
	x, ok := l.find(d)
	if !ok || off < 0 || off >= x.have {
		return nil, fetch.ErrMissing
	}
	f, err := os.OpenFile(x.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fetch.ErrMissing // it was moved a moment ago
	}
	if err != nil {
		return nil, fmt.Errorf("metal: read for a peer: %w", err)
	}
	defer f.Close()
	if x.chunks != nil {
		i := int(off / firmware.ChunkSize)
		at := int64(i) * firmware.ChunkSize
		b := make([]byte, min(firmware.ChunkSize, x.size-at))
		if _, err := f.ReadAt(b, at); err != nil {
			return nil, fmt.Errorf("metal: read for a peer: %w", err)
		}
		if i >= len(x.chunks) || sha256.Sum256(b) != x.chunks[i] {
			return nil, fmt.Errorf("metal: read for a peer: chunk %d of %s is not what was written; the disk may be failing", i, x.path)
		}
		return b[off-at:], nil
	}
	if err := l.prove(ctx, d, f, x.size); err != nil {
		return nil, err
	}
	b := make([]byte, min(pieceSize, x.size-off))
	if _, err := f.ReadAt(b, off); err != nil {
		return nil, fmt.Errorf("metal: read for a peer: %w", err)
	}
	return b, nil
}

// prove reads a file whole and compares its digest, unless that was done a
// moment ago.
func (l *Library) prove(ctx context.Context, d fetch.Digest, f *os.File, size int64) error {
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("metal: read for a peer: %w", err)
	}
	l.mu.Lock()
	p, ok := l.proved[d]
	l.mu.Unlock()
	now := time.Now()
	if ok && now.Sub(p.at) < provedFor && p.size == size && p.mod.Equal(fi.ModTime()) {
		return nil
	}
	h := sha256.New()
	buf := make([]byte, pieceSize)
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(buf[:min(pieceSize, size-at)], at)
		h.Write(buf[:n])
		if at += int64(n); err != nil && !errors.Is(err, io.EOF) || n == 0 {
			return fmt.Errorf("metal: read for a peer: %w", errors.Join(err))
		}
	}
	if fetch.Digest(h.Sum(nil)) != d {
		return fmt.Errorf("metal: read for a peer: %s is not what was written; the disk may be failing", f.Name())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.proved == nil || len(l.proved) >= 4*maxOpened {
		l.proved = map[fetch.Digest]proof{}
	}
	l.proved[d] = proof{now, size, fi.ModTime()}
	return nil
}

// Manifest implements peer.Blobs.
func (l *Library) Manifest(image fetch.Digest) ([]byte, error) {
	b, err := os.ReadFile(l.Images.file("manifest", image[:]))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fetch.ErrMissing
	}
	if err != nil {
		return nil, fmt.Errorf("metal: read a manifest for a peer: %w", err)
	}
	return b, nil
}
