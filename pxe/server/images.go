package server

import (
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/httpboot"
	"github.com/muster-edge/muster/pxe/tftp"
)

// cpus are the processors that images can be for.
var cpus = []string{"amd64", "arm64"}

// Dir serves images from a directory as `muster image recovery` writes it:
// recovery.efi at its top is amd64's, other processors have a folder of
// their own, such as arm64/recovery.efi. A folder amd64 wins over the top.
type Dir string

// Open implements ImageSource. Only ImageName is served.
func (d Dir) Open(cpu, name string) (File, error) {
	if name != ImageName {
		return nil, fmt.Errorf("server: open image file %q: %w", name, fs.ErrNotExist)
	}
	known := false
	for _, c := range cpus {
		known = known || c == cpu
	}
	if !known {
		return nil, fmt.Errorf("server: open image for %q: %w", cpu, fs.ErrNotExist)
	}
	// A root keeps links inside from leading outside.
	root, err := os.OpenRoot(string(d))
	if err != nil {
		return nil, fmt.Errorf("server: open image directory: %w", err)
	}
	defer root.Close()
	f, err := root.Open(cpu + "/" + name)
	if os.IsNotExist(err) && cpu == "amd64" {
		f, err = root.Open(name)
	}
	if err != nil {
		return nil, fmt.Errorf("server: open image: %w", err)
	}
	return f, nil
}

// openName resolves a name from the network: CPU/recovery.efi, or recovery.efi
// alone, which people type into other DHCP servers.
func (s *Server) openName(name string) (File, error) {
	cpu, file, ok := strings.Cut(name, "/")
	if !ok {
		cpu, file = "amd64", name
	}
	if file != ImageName {
		return nil, fs.ErrNotExist
	}
	for _, c := range cpus {
		if c == cpu {
			return s.cfg.Images.Open(cpu, file)
		}
	}
	return nil, fs.ErrNotExist
}

// images is what can be served right now.
func (s *Server) images() map[string]pxe.Image {
	out := map[string]pxe.Image{}
	for _, cpu := range cpus {
		f, err := s.cfg.Images.Open(cpu, ImageName)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		f.Close()
		if err == nil && st.Mode().IsRegular() {
			out[cpu] = pxe.Image{Path: cpu + "/" + ImageName, Size: st.Size()}
		}
	}
	return out
}

// The two file servers each name their own File interface; these adapters
// keep the dynamic type, which sendfile looks at.
type tftpSource struct{ s *Server }

func (t tftpSource) Open(name string) (tftp.File, error) { return t.s.openName(name) }

type httpSource struct{ s *Server }

func (h httpSource) Open(name string) (httpboot.File, error) { return h.s.openName(name) }
