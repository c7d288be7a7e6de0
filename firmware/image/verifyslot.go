package image

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-edge/muster/firmware"
)

// findManifest returns the one manifest in a folder; dir may name the file
// itself, where a folder holds several images.
func findManifest(dir string) (string, error) {
	if strings.HasSuffix(dir, ".manifest") {
		return dir, nil
	}
	recovery := filepath.Join(dir, ManifestFile)
	if _, err := os.Stat(recovery); err == nil {
		return recovery, nil
	}
	found, _ := filepath.Glob(filepath.Join(dir, "*.manifest"))
	switch len(found) {
	case 0:
		return "", fmt.Errorf("image: verify: %s holds no %s and no *.manifest: build with --release-key FILE", dir, ManifestFile)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("image: verify: %s holds %d manifests: name one of them", dir, len(found))
}

// sectionText is a section as text, "" if it cannot be read.
func sectionText(pe *firmware.PE, name string) string {
	b, err := pe.Section(name)
	if err != nil {
		return ""
	}
	return string(b)
}

// checkSlot looks at the files beside the UKI: their digests, the loader's
// measurement, that the command line names this root, and, block by block,
// that the hash tree is that of the root.
func checkSlot(dir string, m firmware.Manifest, measured firmware.Measurements, cmdline string, add func(string, bool, string, ...any) bool) {
	s := m.Slot
	add("command line", strings.HasSuffix(cmdline, " "+s.RootArguments()), "%s", cmdline)
	whole := true
	for _, f := range []firmware.File{s.Root, s.Verity, s.Loader} {
		got, err := fileOf(filepath.Join(dir, f.File), f.File)
		if errors.Is(err, fs.ErrNotExist) {
			whole = add(f.File, false, "it is not here")
			continue
		}
		if err != nil {
			whole = add(f.File, false, "%v", err)
			continue
		}
		whole = add(f.File, got == f, "%d bytes, sha256 %s%s", got.Size, got.SHA256, unlike(got.SHA256, f.SHA256)) && whole
	}
	if loader, err := readCapped(filepath.Join(dir, s.Loader.File), maxLoaderDeb); err == nil {
		digest, err := authenticode(loader)
		add("loader (PCR 4)", err == nil && digest == m.Measurements.Loader, "%s%s", digest, unlike(digest, m.Measurements.Loader))
		if pe, err := firmware.ParsePE(loader); err == nil {
			checkSignature(pe, m, digest, func(name string, ok bool, format string, args ...any) bool {
				return add("loader: "+name, ok, format, args...)
			})
		}
	}
	root, err := os.Open(filepath.Join(dir, s.Root.File))
	if err != nil {
		return
	}
	defer root.Close()
	chunks, err := firmware.Chunks(io.LimitReader(root, firmware.SizeRoot+1))
	bad := -1
	for i := range min(len(chunks), len(s.Chunks)) {
		if chunks[i] != s.Chunks[i] {
			bad = i
			break
		}
	}
	switch {
	case err != nil:
		add("chunks", false, "%v", err)
	case bad >= 0:
		add("chunks", false, "chunk %d is not what the manifest says", bad)
	default:
		add("chunks", slices.Equal(chunks, s.Chunks), "%d of %d bytes each, the manifest names %d", len(chunks), s.ChunkSize, len(s.Chunks))
	}
	if err := checkTree(root, filepath.Join(dir, s.Verity.File), *s); err != nil {
		add("hash tree", false, "%v", err)
		return
	}
	add("hash tree", whole, "leads from every block of root to the root hash %s", s.RootHash)
}

const verityBlock = 4096

// checkTree computes dm-verity's hash tree (version 1, SHA-256, salt first)
// over root and compares it with the file, block by block. Written here and not
// asked of veritysetup, so that images can be checked anywhere.
func checkTree(root io.ReaderAt, verity string, s firmware.SlotImage) error {
	tree, err := readCapped(verity, firmware.SizeVerity)
	if err != nil {
		return err
	}
	if len(tree) < verityBlock || string(tree[:8]) != "verity\x00\x00" {
		return errors.New("it does not begin as one")
	}
	if id := strings.ReplaceAll(s.VerityUUID, "-", ""); hex.EncodeToString(tree[16:32]) != id {
		return errors.New("its UUID is another")
	}
	blocks := s.Root.Size / verityBlock
	saltSize := int(binary.LittleEndian.Uint16(tree[80:]))
	if saltSize > 256 || binary.LittleEndian.Uint64(tree[72:]) != uint64(blocks) {
		return errors.New("its superblock is for another root")
	}
	salt := tree[88 : 88+saltSize]
	hash := func(block []byte) []byte {
		h := sha256.New()
		h.Write(salt)
		h.Write(block)
		return h.Sum(nil)
	}
	// Level 0 holds the hashes of data; the file has the highest level first.
	block := make([]byte, verityBlock)
	var level []byte
	for i := range blocks {
		if _, err := root.ReadAt(block, i*verityBlock); err != nil {
			return err
		}
		level = append(level, hash(block)...)
	}
	var levels [][]byte
	for {
		if pad := len(level) % verityBlock; pad != 0 || len(level) == 0 {
			level = append(level, make([]byte, verityBlock-pad)...)
		}
		levels = append(levels, level)
		if len(level) == verityBlock {
			break
		}
		var next []byte
		for at := 0; at < len(level); at += verityBlock {
			next = append(next, hash(level[at:at+verityBlock])...)
		}
		level = next
	}
	at := verityBlock
	for _, l := range slices.Backward(levels) {
		if at+len(l) > len(tree) || !slices.Equal(tree[at:at+len(l)], l) {
			return errors.New("it is not that of root")
		}
		at += len(l)
	}
	if got := hash(levels[len(levels)-1]); hex.EncodeToString(got) != s.RootHash.String() {
		return fmt.Errorf("it leads to %x, the manifest says %s", got, s.RootHash)
	}
	return nil
}
