package image

import (
	"bytes"
	"debug/pe"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
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

// TestBenchBoot: the time from QEMU's start to /init and to the request in the
// approval queue, beside an image of the same size and kernel whose /init does
// nothing but say that it runs. What the two share is firmware, transfer and
// kernel; the rest is ours.
func TestBenchBoot(t *testing.T) {
	part := benchrow.Begin(t, "boot")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (dir string, timings map[string]float64) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), filepath.Join(root, "bin/muster"), append(append([]string{"lab", "run"}, args...), "-o", "json")...)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v (make build first)\n%s", args, err, out)
		}
		lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
		var r struct {
			Dir     string             `json:"dir"`
			Timings map[string]float64 `json:"timings"`
		}
		if err := json.Unmarshal(lines[len(lines)-1], &r); err != nil {
			t.Fatal(err)
		}
		return r.Dir, r.Timings
	}
	var init, request, bare []float64
	empty := filepath.Join(t.TempDir(), "empty.efi")
	for range 3 {
		dir, ours := run("enroll")
		if len(init) == 0 {
			images, err := filepath.Glob(filepath.Join(dir, "*", "*.efi"))
			if err != nil || len(images) != 1 {
				t.Fatalf("images of the run in %s: %v, %v", dir, images, err)
			}
			if err := os.WriteFile(empty, emptied(t, images[0]), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		_, theirs := run("boot", "--image", empty)
		init = append(init, ours["power_on_to_init_s"])
		request = append(request, ours["power_on_to_request_s"])
		bare = append(bare, theirs["power_on_to_init_s"])
	}
	const peer = "an empty image of the same size: /init"
	part.Add(t, benchrow.Row{What: "power-on to /init, by TFTP on OVMF", Unit: "s", Less: true, Ours: init, Peer: peer, Theirs: bare,
		Note: "emulated processor (TCG), one core for the machine"})
	part.Add(t, benchrow.Row{What: "power-on to the request in the queue", Unit: "s", Less: true, Ours: request, Peer: peer, Theirs: bare,
		Note: "ours has found its address, its TPM and the centre, and has proved itself"})
}

// emptied is the image with another initrd of the same length.
func emptied(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	s := f.Section(".initrd")
	if s == nil {
		t.Fatal("no initrd")
	}
	src, prog := filepath.Join(t.TempDir(), "init.go"), filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(src, []byte("package main\n\nimport \"time\"\n\nfunc main() {\n\tprintln(\"muster-node: init started\")\n\ttime.Sleep(1 << 62)\n}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", prog, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	init, err := os.ReadFile(prog)
	if err != nil {
		t.Fatal(err)
	}
	room := int(s.Offset) + int(s.VirtualSize)
	pad := make([]byte, int(s.VirtualSize)-len(init)-4096)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(pad) // nothing on the way can make it smaller
	packed, err := archive([]file{{path: "/init", exec: true, data: init}, {path: "/pad", data: pad}})
	if err != nil {
		t.Fatal(err)
	}
	if len(packed) > int(s.VirtualSize) {
		t.Fatalf("%d bytes for a room of %d", len(packed), s.VirtualSize)
	}
	clear(b[s.Offset:room])
	copy(b[s.Offset:], packed)
	return b
}
