package image

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
)

func TestArchive(t *testing.T) {
	files := []file{
		{path: "/init", exec: true, data: []byte("program")},
		{path: "/etc/muster/site.json", data: []byte("{}")},
		{path: "/lib/a.ko", data: nil},
	}
	out, err := archive(files)
	if err != nil {
		t.Fatal(err)
	}
	backwards := []file{files[2], files[1], files[0]}
	if again, err := archive(backwards); err != nil || !bytes.Equal(out, again) {
		t.Errorf("the order of files changed the bytes (%v)", err)
	}
	want := map[string]cpio.FileMode{
		"init": 0o100755, "etc/muster/site.json": 0o100644, "lib/a.ko": 0o100644,
		"dev": 0o40755, "etc": 0o40755, "etc/muster": 0o40755, "lib": 0o40755, "mnt": 0o40755,
		"proc": 0o40755, "run": 0o40755, "sys": 0o40755, "tmp": 0o40755,
	}
	r := cpio.NewReader(bytes.NewReader(out))
	before := ""
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != want[h.Name] || h.Uid != 0 || h.Guid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: mode %o, want %o; owner %d:%d, date %v", h.Name, h.Mode, want[h.Name], h.Uid, h.Guid, h.ModTime)
		}
		if h.Name <= before {
			t.Errorf("%s comes after %s", h.Name, before)
		}
		before = h.Name
		delete(want, h.Name)
		if data, err := io.ReadAll(r); err != nil || h.Name == "init" && string(data) != "program" {
			t.Errorf("%s holds %q (%v)", h.Name, data, err)
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestArchiveRefuses(t *testing.T) {
	for when, files := range map[string][]file{
		"a path is relative":      {{path: "init"}},
		"a path climbs":           {{path: "/a/../init"}},
		"a path is the root":      {{path: "/"}},
		"a file is there twice":   {{path: "/init"}, {path: "/init"}},
		"a file is also a folder": {{path: "/a"}, {path: "/a/b"}},
		"a folder is also a file": {{path: "/a/b"}, {path: "/a"}},
	} {
		if _, err := archive(files); err == nil {
			t.Errorf("when %s, then no error", when)
		}
	}
}

func TestCompress(t *testing.T) {
	data := bytes.Repeat([]byte("muster "), 100_000)
	packed, err := compress(data)
	if err != nil {
		t.Fatal(err)
	}
	again, err := compress(data)
	if err != nil || !bytes.Equal(packed, again) {
		t.Errorf("packing twice gave other bytes (%v)", err)
	}
	// The kernel's limit is far above; a machine with 1 GB has no more to
	// spare than this.
	r, err := zstd.NewReader(nil, zstd.WithDecoderMaxWindow(zstdWindow))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if back, err := r.DecodeAll(packed, nil); err != nil || !bytes.Equal(back, data) {
		t.Errorf("it does not come back (%v)", err)
	}
}
