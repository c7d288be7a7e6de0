package image

import (
	"bytes"
	"debug/pe"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/cavaliergopher/cpio"

	"github.com/muster-edge/muster/internal/dev/benchrow"
)

// TestBenchUKI: the size of the recovery image by its parts. MUSTER_BENCH_UKI
// names an image that was built; the target is 40 MB for all of it.
func TestBenchUKI(t *testing.T) {
	part := benchrow.Begin(t, "uki")
	path := os.Getenv("MUSTER_BENCH_UKI")
	if path == "" {
		t.Skip("MUSTER_BENCH_UKI names no image: build one with muster image recovery")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	mb := func(what string, n int, note string) {
		part.Add(t, benchrow.Row{What: what, Unit: "MB", Less: true, Ours: []float64{float64(n) / 1e6}, Note: note})
	}
	mb(filepath.Base(path)+", whole", len(b), "target: at most 40 MB")
	f, err := pe.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range f.Sections {
		if s.Size > 100_000 {
			mb("section "+s.Name, int(s.Size), "")
		}
		if s.Name != ".initrd" {
			continue
		}
		data, err := s.Data()
		if err != nil {
			t.Fatal(err)
		}
		d, err := zstd.NewReader(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		modules, count, rest := 0, 0, 0
		for r := cpio.NewReader(d); ; {
			h, err := r.Next()
			if err != nil {
				break
			}
			switch {
			case filepath.Ext(h.Name) == ".ko":
				modules, count = modules+int(h.Size), count+1
			case h.Name == "init":
				mb("in the initrd, unpacked: /init (muster-node)", int(h.Size), "target: at most 20 MB")
			default:
				rest += int(h.Size)
			}
		}
		d.Close()
		mb("in the initrd, unpacked: kernel modules", modules, fmt.Sprintf("%d modules", count))
		mb("in the initrd, unpacked: the rest", rest, "")
	}
}
