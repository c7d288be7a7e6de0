package metal_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/agent/slots/metal"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// release is a signed slot image with its files.
type release struct {
	m        firmware.Manifest
	envelope []byte
	pub      crypto.PublicKey
	files    map[fetch.Digest][]byte
}

func filler(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func newRelease(t *testing.T) *release {
	t.Helper()
	r := &release{files: map[fetch.Digest][]byte{}}
	file := func(name string, b []byte) firmware.File {
		d := sha256.Sum256(b)
		r.files[d] = b
		return firmware.File{File: name, Size: int64(len(b)), SHA256: d}
	}
	root := filler(1, 5*firmware.ChunkSize/2)
	chunks, err := firmware.Chunks(bytes.NewReader(root))
	if err != nil {
		t.Fatal(err)
	}
	uki := file("edge.efi", filler(2, 2_500_000))
	sections := []firmware.SectionDigest{{Name: ".linux", SHA256: firmware.Digest{1}}}
	pcr, err := firmware.PCR11(sections)
	if err != nil {
		t.Fatal(err)
	}
	r.m = firmware.Manifest{
		Format: firmware.ManifestFormat, Name: "edge", Version: "2", Kind: fleet.ImageSlot, Arch: "amd64", File: uki.File, SHA256: uki.SHA256, Size: uki.Size,
		Measurements: firmware.Measurements{Authenticode: firmware.Digest{2}, Kernel: firmware.Digest{3}, Loader: firmware.Digest{4}, PCR11: pcr, Sections: sections},
		Created:      time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		Slot: &firmware.SlotImage{Root: file("edge.root", root), Verity: file("edge.verity", filler(3, 81920)), Loader: file("edge.loader.efi", filler(4, 5000)),
			RootHash: firmware.Digest{5}, RootUUID: "11111111-1111-1111-1111-111111111111", VerityUUID: "22222222-2222-2222-2222-222222222222",
			ChunkSize: firmware.ChunkSize, Chunks: chunks},
	}
	payload, err := r.m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	key := ed25519.NewKeyFromSeed(filler(9, ed25519.SeedSize))
	r.pub = key.Public()
	e, err := statement.Sign(firmware.ManifestType, payload, key)
	if err != nil {
		t.Fatal(err)
	}
	if r.envelope, err = json.Marshal(e); err != nil {
		t.Fatal(err)
	}
	return r
}

// box is a node: partitions and ESP are files.
type box struct {
	t     *testing.T
	name  string
	r     *release
	dir   string
	slots [2]firmware.Slot
	img   *metal.Images
	lib   *metal.Library
	team  *fetch.Team
	wan   *int64
}

func newBox(t *testing.T, name string, r *release, wan *int64) *box {
	b := &box{t: t, name: name, r: r, dir: t.TempDir(), wan: wan, team: &fetch.Team{Self: name, Mates: func() []fetch.Mate { return nil }}}
	parts := map[string]string{}
	for _, l := range []string{firmware.LabelRootA, firmware.LabelVerityA, firmware.LabelRootB, firmware.LabelVerityB} {
		parts[l] = filepath.Join(b.dir, l)
		if err := os.WriteFile(parts[l], make([]byte, 12<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.img = &metal.Images{Dir: filepath.Join(b.dir, "images"), ReleaseKeys: []crypto.PublicKey{r.pub}, Arch: "amd64", Parts: parts,
		Fetcher: func() *fetch.Fetcher {
			return &fetch.Fetcher{Team: b.team, Sources: func() []fetch.Source { return []fetch.Source{centre{b}} }}
		},
		Manifest: func(context.Context, firmware.Digest) ([]byte, error) { return r.envelope, nil }, WriteSlot: install.WriteSlot}
	b.lib = &metal.Library{Images: b.img, Slots: func() [2]firmware.Slot { return b.slots }, ESP: filepath.Join(b.dir, "esp"), Team: b.team}
	if _, err := b.img.Target(t.Context(), fleet.ImageRef{SHA256: r.m.SHA256[:]}); err != nil {
		t.Fatal(err)
	}
	return b
}

type centre struct{ b *box }

func (centre) Name() string { return "centre" }

func (c centre) Open(_ context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	f, ok := c.b.r.files[d]
	if !ok {
		return nil, fetch.ErrMissing
	}
	*c.b.wan += n
	return io.NopCloser(bytes.NewReader(f[off : off+n])), nil
}

// mate is a box as its peers see it, without a network.
type mate struct{ *box }

func (m mate) Name() string { return m.name }

func (m mate) Standing(_ context.Context, d fetch.Digest) (fetch.Standing, error) {
	return m.lib.Standing(d), nil
}

func (m mate) Open(ctx context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	var out []byte
	for n > 0 {
		p, err := m.lib.Read(ctx, d, off)
		if err != nil {
			if len(out) > 0 {
				break
			}
			return nil, err
		}
		p = p[:min(int64(len(p)), n)]
		out, off, n = append(out, p...), off+int64(len(p)), n-int64(len(p))
	}
	return io.NopCloser(bytes.NewReader(out)), nil
}

// update writes slot B and the boot file as the keeper does.
func (b *box) update() error {
	b.slots[firmware.SlotB] = firmware.Slot{State: firmware.SlotWriting, Image: b.r.m.SHA256}
	if err := b.img.Write(b.t.Context(), firmware.SlotB, b.r.m.SHA256, 0, func(int64) error { return nil }); err != nil {
		return err
	}
	f, err := b.img.Boot(b.t.Context(), b.r.m.SHA256)
	if err != nil {
		return err
	}
	if err := efi.NewESP(b.lib.ESP).Stage(firmware.StagedPrefix+b.r.m.Entry(), f, b.r.m.Size, b.r.m.SHA256); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	b.slots[firmware.SlotB].State = firmware.SlotStaged
	return nil
}

// Three nodes write their slots one after the other: the centre sends each file
// once, the others come from the slots of the first.
func TestSlotsServeTheNextNode(t *testing.T) {
	var wan int64
	synctest.Test(t, func(t *testing.T) {
		r := newRelease(t)
		var boxes []*box
		for i := range 3 {
			b := newBox(t, fmt.Sprint("n", i), r, &wan)
			others := append([]*box{}, boxes...)
			b.team.Mates = func() (out []fetch.Mate) {
				for _, o := range others {
					out = append(out, mate{o})
				}
				return out
			}
			if err := b.update(); err != nil {
				t.Fatal(err)
			}
			boxes = append(boxes, b)
		}
		image := r.m.Size + r.m.Slot.WriteSize()
		if wan != image {
			t.Errorf("%d bytes from the centre, the image has %d", wan, image)
		}
		if !boxes[0].team.Serving(time.Now()) || boxes[2].team.Serving(time.Now()) {
			t.Error("the first one served, the last did not")
		}
	})
}

// What is in a slot is served as far as it is verified, and what rots on the
// medium is served no more.
func TestLibraryServesWhatIsVerified(t *testing.T) {
	var wan int64
	r := newRelease(t)
	b := newBox(t, "n0", r, &wan)
	root, verity, uki := fetch.Digest(r.m.Slot.Root.SHA256), fetch.Digest(r.m.Slot.Verity.SHA256), fetch.Digest(r.m.SHA256)
	for _, d := range []fetch.Digest{root, verity, uki, {7}} {
		if st := b.lib.Standing(d); st.Have != 0 {
			t.Errorf("%+v of what is not here", st)
		}
		if _, err := b.lib.Read(t.Context(), d, 0); !errors.Is(err, fetch.ErrMissing) {
			t.Error(err)
		}
	}
	// The power goes after the first chunk: it alone is served.
	b.slots[firmware.SlotB] = firmware.Slot{State: firmware.SlotWriting, Image: r.m.SHA256}
	cut := errors.New("cut")
	if err := b.img.Write(t.Context(), firmware.SlotB, r.m.SHA256, 0, func(int64) error { return cut }); !errors.Is(err, cut) {
		t.Fatal(err)
	}
	if st := b.lib.Standing(root); st.Have != firmware.ChunkSize {
		t.Errorf("%+v after one chunk", st)
	}
	if _, err := b.lib.Read(t.Context(), root, firmware.ChunkSize); !errors.Is(err, fetch.ErrMissing) {
		t.Error("the second chunk:", err)
	}
	if err := b.update(); err != nil {
		t.Fatal(err)
	}
	for d, size := range map[fetch.Digest]int64{root: r.m.Slot.Root.Size, verity: r.m.Slot.Verity.Size, uki: r.m.Size} {
		if st := b.lib.Standing(d); st.Have != size {
			t.Errorf("%+v, want %d", st, size)
		}
		for _, off := range []int64{0, 1, size / 2, size - 1} {
			got, err := b.lib.Read(t.Context(), d, off)
			if err != nil || len(got) == 0 || !bytes.Equal(got, r.files[d][off:off+int64(len(got))]) {
				t.Errorf("at %d of %x: %d bytes, %v", off, d[:4], len(got), err)
			}
		}
		if _, err := b.lib.Read(t.Context(), d, size); !errors.Is(err, fetch.ErrMissing) {
			t.Error(err)
		}
		if _, err := b.lib.Read(t.Context(), d, -1); !errors.Is(err, fetch.ErrMissing) {
			t.Error(err)
		}
	}
	if m, err := b.lib.Manifest(uki); err != nil || !bytes.Equal(m, r.envelope) {
		t.Error(err)
	}
	if _, err := b.lib.Manifest(root); !errors.Is(err, fetch.ErrMissing) {
		t.Error(err)
	}
	// The loader counts a try: the file has another name.
	dir := filepath.Join(b.lib.ESP, filepath.FromSlash(bootmodel.Entries))
	if err := os.Rename(filepath.Join(dir, firmware.StagedPrefix+r.m.Entry()), filepath.Join(dir, strings.TrimSuffix(r.m.Entry(), ".efi")+"+2-1.efi")); err != nil {
		t.Fatal(err)
	}
	if st := b.lib.Standing(uki); st.Have != r.m.Size {
		t.Errorf("%+v under its other name", st)
	}
	// Rot.
	for d, name := range map[fetch.Digest]string{root: b.img.Parts[firmware.LabelRootB], verity: b.img.Parts[firmware.LabelVerityB]} {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("rot"), 9); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if got, err := b.lib.Read(t.Context(), d, 0); err == nil || !strings.Contains(err.Error(), "disk may be failing") {
			t.Errorf("%d rotten bytes were served (%v)", len(got), err)
		}
	}
	if got, err := b.lib.Read(t.Context(), root, firmware.ChunkSize); err != nil || len(got) != firmware.ChunkSize {
		t.Error("the chunk beside it is whole:", err)
	}
	// A slot that is being written anew serves nothing of the old one.
	b.slots[firmware.SlotB] = firmware.Slot{State: firmware.SlotEmpty}
	b.img.Parts = map[string]string{}
	if _, err := b.lib.Read(t.Context(), fetch.Digest{1}, 0); !errors.Is(err, fetch.ErrMissing) {
		t.Error(err)
	}
}
