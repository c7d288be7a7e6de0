package firmware

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// ChunkSize is how much of a slot image is fetched, checked and written at a
// time.
const ChunkSize = 4 << 20

// maxChunks is how many chunks the largest root has that fits its partition.
const maxChunks = SizeRoot / ChunkSize

// SlotImage is what an image of kind slot has beside its UKI: the files of a
// system, and what a node must know of them before it writes one.
type SlotImage struct {
	// Root is the file system (erofs), Verity its hash tree with superblock
	// (dm-verity), Loader the boot loader for the ESP.
	Root   File `json:"root"`
	Verity File `json:"verity"`
	Loader File `json:"loader"`
	// RootHash is in the UKI's command line: whoever believes the UKI
	// believes the file system.
	RootHash Digest `json:"root_hash"`
	// RootUUID and VerityUUID are in the superblocks and in the command line:
	// by them the initrd finds the slot that belongs to the UKI.
	RootUUID   string `json:"root_uuid"`
	VerityUUID string `json:"verity_uuid"`
	// K3s is the version of k3s ("v1.36.3+k3s1"), K3sDigest the digest of its
	// program. Both are empty where an image has none.
	K3s       string `json:"k3s,omitempty"`
	K3sDigest Digest `json:"k3s_digest,omitzero"`
	// EtcdMinor is the minor version of etcd inside ("3.6"). A step that
	// raises it cannot be taken back.
	EtcdMinor string `json:"etcd_minor,omitempty"`
	// ChunkSize is the constant ChunkSize; Chunks are the SHA-256 of the
	// chunks of Root in order, the last may be shorter.
	ChunkSize int64    `json:"chunk_size"`
	Chunks    []Digest `json:"chunks"`
}

// File is one file beside a manifest.
type File struct {
	// File is a name without folders.
	File   string `json:"file"`
	Size   int64  `json:"size"`
	SHA256 Digest `json:"sha256"`
}

var (
	uuidForm    = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	k3sForm     = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+[0-9A-Za-z.+-]{0,64}$`)
	etcdForm    = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,3}$`)
	errNoSlot   = errors.New("an image of kind slot without its files")
	errNotASlot = errors.New("files of a slot in an image of another kind")
)

// validate returns all problems; files are the names taken already.
func (s SlotImage) validate(files map[string]bool) []error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	for _, f := range []struct {
		what string
		File
		max int64
	}{{"root", s.Root, SizeRoot}, {"verity", s.Verity, SizeVerity}, {"loader", s.Loader, maxLoader}} {
		check(plainName(f.File.File) && !files[f.File.File], "%s: file %.40q is not a plain file name of its own", f.what, f.File.File)
		files[f.File.File] = true
		check(f.Size > 0 && f.Size <= f.max, "%s: size %d is not between 1 and %d", f.what, f.Size, f.max)
		check(!f.SHA256.IsZero(), "%s: sha256 is zero", f.what)
	}
	// dm-verity and disks with sectors of 4 KiB count in such blocks.
	check(s.Root.Size%4096 == 0 && s.Verity.Size%4096 == 0, "sizes of root (%d) and verity (%d) are not multiples of 4096", s.Root.Size, s.Verity.Size)
	check(!s.RootHash.IsZero(), "root_hash is zero")
	check(uuidForm.MatchString(s.RootUUID), "root_uuid %.40q is not a UUID in lower case", s.RootUUID)
	check(uuidForm.MatchString(s.VerityUUID) && s.VerityUUID != s.RootUUID, "verity_uuid %.40q is not a UUID of its own in lower case", s.VerityUUID)
	check((s.K3s == "") == s.K3sDigest.IsZero() && (s.K3s == "") == (s.EtcdMinor == ""), "k3s, k3s_digest and etcd_minor go together")
	check(s.K3s == "" || k3sForm.MatchString(s.K3s), "k3s %.40q is not a version", s.K3s)
	check(s.EtcdMinor == "" || etcdForm.MatchString(s.EtcdMinor), "etcd_minor %.40q is not a minor version such as 3.6", s.EtcdMinor)
	check(s.ChunkSize == ChunkSize, "chunk_size is %d, want %d", s.ChunkSize, int64(ChunkSize))
	check(int64(len(s.Chunks)) == (s.Root.Size+ChunkSize-1)/ChunkSize && len(s.Chunks) <= maxChunks, "%d chunks, and root has %d bytes", len(s.Chunks), s.Root.Size)
	for i, c := range head(s.Chunks, maxChunks) {
		check(!c.IsZero(), "chunk %d is zero", i)
	}
	return problems
}

// maxLoader bounds a boot loader; systemd-boot has 130 kB.
const maxLoader = 16 << 20

func head[T any](s []T, n int) []T { return s[:min(len(s), n)] }

// Files returns all files of the image: the UKI first, then those of a slot.
// Media are left out: a node needs none.
func (m Manifest) Files() []File {
	out := []File{{File: m.File, Size: m.Size, SHA256: m.SHA256}}
	if s := m.Slot; s != nil {
		out = append(out, s.Root, s.Verity, s.Loader)
	}
	return out
}

// Entry is the name of the image's boot file below EFI/Linux, without counter.
func (m Manifest) Entry() string {
	// A plus would be read as a counter.
	return m.Name + "-" + strings.ReplaceAll(m.Version, "+", "_") + ".efi"
}

// ChunkRange returns where chunk i of Root begins and how long it is.
func (s SlotImage) ChunkRange(i int) (offset, length int64) {
	offset = int64(i) * ChunkSize
	return offset, min(ChunkSize, s.Root.Size-offset)
}

// Chunks reads r to its end and returns the digests of its chunks.
func Chunks(r io.Reader) ([]Digest, error) {
	var out []Digest
	for {
		h := sha256.New()
		n, err := io.CopyN(h, r, ChunkSize)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("firmware: hash chunks: %w", err)
		}
		if n > 0 {
			out = append(out, Digest(h.Sum(nil)))
		}
		if err != nil {
			return out, nil
		}
	}
}

// RootArguments are the words of the kernel command line that name the root:
// by the UUIDs of its content, so that one UKI starts from either slot.
func (s SlotImage) RootArguments() string {
	return "roothash=" + s.RootHash.String() + " systemd.verity_root_data=UUID=" + s.RootUUID + " systemd.verity_root_hash=UUID=" + s.VerityUUID +
		" muster.root_size=" + strconv.FormatInt(s.Root.Size, 10)
}
