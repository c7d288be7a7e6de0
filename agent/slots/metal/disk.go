package metal

import (
	"context"
	"debug/pe"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent/slots"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/bootmodel"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/efi"
)

// Record is the record on the meta partition. The device is open only during a
// call, so that a person's command and the agent do not shut each other out:
// slots.Lock keeps them apart.
type Record struct {
	// Device is the partition.
	Device string
}

// Read implements slots.Record.
func (r Record) Read() (m firmware.Meta, err error) {
	d, err := disk.Open(r.Device)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return disk.ReadMeta(d)
}

// Write implements slots.Record.
func (r Record) Write(m firmware.Meta) (err error) {
	d, err := disk.Open(r.Device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	last, err := disk.ReadMeta(d)
	if err != nil {
		return err
	}
	_, err = disk.WriteMeta(d, m, last.Seq)
	return err
}

// ESP is the mounted EFI system partition.
type ESP struct {
	// Dir is where it is mounted.
	Dir string

	mu    sync.Mutex
	known map[string]seen
}

// seen is a boot file that was read before.
type seen struct {
	size int64
	at   time.Time
	file bootmodel.File
}

func (e *ESP) esp() *efi.ESP { return efi.NewESP(e.Dir) }

// Look implements slots.ESP. What the loader would start next is asked of its
// model, with what the files on the partition say of themselves.
func (e *ESP) Look() (slots.View, error) {
	var v slots.View
	var err error
	if v.Files, err = e.esp().BootFiles(); err != nil {
		return v, err
	}
	if v.Free, v.Writable, err = e.esp().Space(); err != nil {
		return v, err
	}
	m := bootmodel.Machine{ESP: bootmodel.ESP{firmware.LoaderFile: {Starts: true, Loader: true}}, Order: []bootmodel.Target{{File: firmware.LoaderFile}}}
	e.mu.Lock()
	defer e.mu.Unlock()
	known := map[string]seen{}
	for _, f := range v.Files {
		s := e.read(f.Name)
		known[f.Name] = s
		m.ESP[path.Join(bootmodel.Entries, f.Name)] = s.file
	}
	e.known = known
	if out := m.PowerOn(false); out.File != "" {
		v.Next, _, _ = bootmodel.Counter(path.Base(out.File))
	}
	return v, nil
}

// read looks into a boot file, once for each that there is.
func (e *ESP) read(name string) seen {
	full := filepath.Join(e.Dir, filepath.FromSlash(bootmodel.Entries), name)
	fi, err := os.Lstat(full)
	if err != nil || !fi.Mode().IsRegular() {
		return seen{file: bootmodel.File{Garbled: true}}
	}
	if s, ok := e.known[name]; ok && s.size == fi.Size() && s.at.Equal(fi.ModTime()) {
		return s
	}
	return seen{fi.Size(), fi.ModTime(), inside(full)}
}

// maxRelease bounds an .osrel section.
const maxRelease = 16 << 10

func inside(full string) bootmodel.File {
	f, err := pe.Open(full)
	if err != nil {
		return bootmodel.File{Garbled: true}
	}
	defer f.Close()
	s := f.Section(firmware.SectionOSRel)
	if s == nil {
		return bootmodel.File{Starts: true}
	}
	b, err := io.ReadAll(io.LimitReader(s.Open(), maxRelease))
	if err != nil {
		return bootmodel.File{Starts: true}
	}
	r := parseRelease(string(b))
	return bootmodel.File{Starts: true, Release: &r}
}

// parseRelease reads what systemd-boot reads of os-release(5).
func parseRelease(s string) bootmodel.Release {
	var r bootmodel.Release
	for _, line := range strings.Split(strings.TrimRight(s, "\x00"), "\n") {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			r.ID = value
		case "IMAGE_ID":
			r.ImageID = value
		case "VERSION_ID":
			r.VersionID = value
		case "IMAGE_VERSION":
			r.ImageVersion = value
		case "BUILD_ID":
			r.BuildID = value
		case "PRETTY_NAME":
			r.PrettyName = value
		}
	}
	return r
}

// Remove implements slots.ESP.
func (e *ESP) Remove(name string) error { return e.esp().Remove(name) }

// Rename implements slots.ESP.
func (e *ESP) Rename(from, to string) error { return e.esp().Rename(from, to) }

// Stage implements slots.ESP.
func (e *ESP) Stage(_ context.Context, name string, want firmware.Digest, size int64, from io.Reader) error {
	return e.esp().Stage(name, from, size, want)
}

// Whole implements slots.ESP.
func (e *ESP) Whole(name string, want firmware.Digest, size int64) (bool, error) {
	return e.esp().Whole(name, size, want)
}

// Shelf are small files of the ESP, for agent/data.
type Shelf struct{ Dir string }

// Put implements data.Shelf.
func (s Shelf) Put(name string, b []byte) error { return efi.NewESP(s.Dir).PutBytes(name, b) }

// Get implements data.Shelf.
func (s Shelf) Get(name string) ([]byte, error) { return efi.NewESP(s.Dir).ReadSmall(name) }

// Remove implements data.Shelf.
func (s Shelf) Remove(name string) error { return efi.NewESP(s.Dir).RemoveFile(name) }

// Loader are the firmware's variables and the way out.
type Loader struct{}

// SetOneShot implements slots.Loader.
func (Loader) SetOneShot(pattern string) error {
	v, err := efi.OpenVars("")
	if err != nil {
		return err
	}
	return v.SetOneShot(pattern)
}

// Restart implements slots.Loader: through systemd, which ends what runs, and
// through the firmware, since nothing here ever loads a kernel for kexec.
func (Loader) Restart(ctx context.Context, _ string) error {
	if out, err := exec.CommandContext(ctx, "systemctl", "--no-block", "reboot").CombinedOutput(); err != nil {
		return fmt.Errorf("metal: restart: %w: %.200s", err, out)
	}
	return nil
}

// MountESP mounts the EFI system partition dev at dir, if nothing is there.
// It stays: the node agent must not be able to mount.
func MountESP(dev, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("metal: mount the ESP: %w", err)
	}
	var a, b unix.Stat_t
	if err := errors.Join(unix.Stat(dir, &a), unix.Stat(filepath.Dir(dir), &b)); err != nil {
		return fmt.Errorf("metal: mount the ESP: %w", err)
	}
	if a.Dev != b.Dev {
		return nil
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOSYMFOLLOW
	if err := unix.Mount(dev, dir, "vfat", flags, "umask=0077,codepage=437,iocharset=ascii,errors=remount-ro"); err != nil {
		return fmt.Errorf("metal: mount the ESP %s: %w", dev, err)
	}
	return nil
}
