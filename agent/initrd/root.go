package initrd

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/firmware"
)

// blockSize is what the image builder uses for data and hashes.
const blockSize = 4096

// root is what the command line says of the file system to start.
type root struct {
	hash                 string // hex
	rootUUID, verityUUID string
	size                 int64
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// parseRoot reads firmware.SlotImage.RootArguments back. Every word must be
// there once: a second one could come from outside of the signed image.
func parseRoot(cmdline string) (root, error) {
	var r root
	seen := map[string]string{}
	for _, w := range strings.Fields(cmdline) {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "roothash", "systemd.verity_root_data", "systemd.verity_root_hash", "muster.root_size":
			if _, twice := seen[k]; twice {
				return r, fmt.Errorf("initrd: the command line names %s twice", k)
			}
			seen[k] = v
		}
	}
	r.hash = seen["roothash"]
	if b, err := hex.DecodeString(r.hash); err != nil || len(b) != len(firmware.Digest{}) || r.hash != strings.ToLower(r.hash) {
		return r, fmt.Errorf("initrd: the command line has no sound roothash: %.80q", r.hash)
	}
	r.rootUUID = strings.TrimPrefix(seen["systemd.verity_root_data"], "UUID=")
	r.verityUUID = strings.TrimPrefix(seen["systemd.verity_root_hash"], "UUID=")
	if !uuidForm.MatchString(r.rootUUID) || !uuidForm.MatchString(r.verityUUID) {
		return r, errors.New("initrd: the command line does not name root and hash tree by UUID")
	}
	n, err := strconv.ParseInt(seen["muster.root_size"], 10, 64)
	if err != nil || n <= 0 || n > firmware.SizeRoot || n%blockSize != 0 {
		return r, fmt.Errorf("initrd: the command line has no sound muster.root_size: %.40q", seen["muster.root_size"])
	}
	r.size = n
	return r, nil
}

// superblockBytes is how much of a partition probe wants.
const superblockBytes = 4096

// erofsUUID returns the UUID of an erofs file system, "" for anything else
// (fs/erofs/erofs_fs.h).
func erofsUUID(b []byte) string {
	const at, magic = 1024, 0xe0f5e1e2
	if len(b) < at+128 || binary.LittleEndian.Uint32(b[at:]) != magic {
		return ""
	}
	return formatUUID(b[at+48 : at+64])
}

// verityUUID returns the UUID of a hash tree, "" for anything else.
func verityUUID(b []byte) string {
	if len(b) < 512 || string(b[:8]) != "verity\x00\x00" {
		return ""
	}
	return formatUUID(b[16:32])
}

func formatUUID(b []byte) string {
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// veritySalt reads the superblock of a hash tree as `veritysetup format` writes
// it, and refuses everything but what our builder makes: then nothing in it
// but the salt is a choice, and a wrong salt does not lead to the root hash.
func veritySalt(b []byte, r root) (string, error) {
	if id := verityUUID(b); id == "" || id != r.verityUUID {
		return "", errors.New("initrd: read hash tree: it has another UUID")
	}
	le := binary.LittleEndian
	saltSize := int(le.Uint16(b[80:]))
	switch {
	case le.Uint32(b[8:]) != 1 || le.Uint32(b[12:]) != 1:
		return "", errors.New("initrd: read hash tree: unknown version")
	case strings.TrimRight(string(b[32:64]), "\x00") != "sha256":
		return "", errors.New("initrd: read hash tree: the algorithm is not SHA-256")
	case le.Uint32(b[64:]) != blockSize || le.Uint32(b[68:]) != blockSize:
		return "", errors.New("initrd: read hash tree: blocks are not of 4096 bytes")
	case le.Uint64(b[72:]) != uint64(r.size/blockSize):
		return "", fmt.Errorf("initrd: read hash tree: it is for %d blocks, the image has %d", le.Uint64(b[72:]), r.size/blockSize)
	case saltSize == 0 || saltSize > 64:
		return "", fmt.Errorf("initrd: read hash tree: salt of %d bytes", saltSize)
	}
	return hex.EncodeToString(b[88 : 88+saltSize]), nil
}

// partition is one that the kernel knows.
type partition struct {
	disk, name string // vda, vda2
	label      string // PARTNAME of the GPT
	device     string // major:minor
	erofs      string // UUIDs of what is inside
	verity     string
	superblock []byte // of a hash tree
}

// candidate is a pair of partitions that the command line may mean.
type candidate struct {
	slot         firmware.SlotID
	root, verity partition
}

// choose pairs root and hash tree: both on one disk, with the labels of one
// slot. The slot's name comes from the label and is a hint; what the pair
// holds is decided by the root hash.
func choose(parts []partition, r root) []candidate {
	var out []candidate
	for _, slot := range []firmware.SlotID{firmware.SlotA, firmware.SlotB} {
		rootLabel, verityLabel := firmware.RootLabels(slot)
		for _, p := range parts {
			if p.label != rootLabel || p.erofs != r.rootUUID {
				continue
			}
			for _, q := range parts {
				if q.disk == p.disk && q.label == verityLabel && q.verity == r.verityUUID {
					out = append(out, candidate{slot, p, q})
				}
			}
		}
	}
	return out
}
