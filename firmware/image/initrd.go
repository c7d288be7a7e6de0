package image

import (
	"bytes"
	"fmt"
	"path"
	"sort"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// file is one entry of the initrd. Paths are absolute and clean; folders on
// the way are made by themselves.
type file struct {
	path string
	exec bool
	data []byte
}

// folders are the mount points /init needs, empty in the image.
var folders = []string{"/dev", "/etc", "/mnt", "/proc", "/run", "/sys", "/tmp"}

// archive packs files as a newc cpio (Documentation/driver-api/early-userspace/
// buffer-format.rst of Linux). Entries are sorted, owned by root, dated 1970,
// with modes that do not depend on the builder's umask: the same files give
// the same bytes.
func archive(files []file) ([]byte, error) {
	byPath := map[string]*file{}
	for _, dir := range folders {
		byPath[dir] = nil
	}
	for i := range files {
		f := &files[i]
		if !strings.HasPrefix(f.path, "/") || path.Clean(f.path) != f.path || f.path == "/" {
			return nil, fmt.Errorf("image: pack initrd: path %q is not absolute and clean", f.path)
		}
		if _, twice := byPath[f.path]; twice {
			return nil, fmt.Errorf("image: pack initrd: %s is there twice", f.path)
		}
		byPath[f.path] = f
		for dir := path.Dir(f.path); dir != "/"; dir = path.Dir(dir) {
			if byPath[dir] != nil {
				return nil, fmt.Errorf("image: pack initrd: %s is a file and a folder", dir)
			}
			byPath[dir] = nil
		}
	}
	names := make([]string, 0, len(byPath))
	for name := range byPath {
		names = append(names, name)
	}
	// Byte order puts a folder before what is in it.
	sort.Strings(names)

	var out bytes.Buffer
	entry := func(ino int, name string, mode, links int, data []byte) {
		fmt.Fprintf(&out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			ino, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		out.WriteString(name)
		out.WriteByte(0)
		pad4(&out)
		out.Write(data)
		pad4(&out)
	}
	for i, name := range names {
		switch f := byPath[name]; {
		case f == nil:
			entry(i+1, name[1:], 0o040755, 2, nil)
		case f.exec:
			entry(i+1, name[1:], 0o100755, 1, f.data)
		default:
			entry(i+1, name[1:], 0o100644, 1, f.data)
		}
	}
	entry(0, "TRAILER!!!", 0, 1, nil)
	return out.Bytes(), nil
}

func pad4(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// compress packs data with zstd at the highest level, on one goroutine so that
// the result depends on the input alone. The window stays within what the
// kernel's decompressor takes (lib/decompress_unzstd.c: 128 MiB) and within
// what a machine with 1 GB of memory can spare.
func compress(data []byte) ([]byte, error) {
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression),
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, fmt.Errorf("image: compress initrd: %w", err)
	}
	defer w.Close()
	return w.EncodeAll(data, nil), nil
}

const zstdWindow = 16 << 20
