// Command vminit is /init of a machine in TestInstallInVM: it installs from a
// second disk onto the first, or, started from the disk, says how it was
// started and stops.
package main

import (
	"bytes"
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// index is the beginning of the disk with the files.
type index struct {
	Key      string           `json:"key"`
	Manifest []byte           `json:"manifest"`
	Image    string           `json:"image"`
	Blobs    map[string]int64 `json:"blobs"`
}

var console io.Writer = os.Stdout

func say(format string, a ...any) { fmt.Fprintf(console, "vminit: "+format+"\n", a...) }

func main() {
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/run", "tmpfs"}} {
		_ = os.MkdirAll(m[1], 0o755)
		_ = unix.Mount(m[0], m[1], m[2], 0, "")
	}
	if f, err := os.OpenFile("/dev/console", os.O_RDWR, 0); err == nil {
		console = f
	}
	say("begin")
	if err := run(); err != nil {
		say("FAILED: %v", err)
	}
	unix.Sync()
	time.Sleep(time.Second)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func run() error {
	for _, m := range []string{"virtio_pci", "virtio_blk", "nvme", "sd_mod", "efivarfs", "vfat", "nls_cp437", "nls_ascii"} {
		if err := load(m, 0); err != nil {
			say("module %s: %v", m, err)
		}
	}
	if err := unix.Mount("efivarfs", "/sys/firmware/efi/efivars", "efivarfs", unix.MS_RDONLY, ""); err != nil {
		say("efivarfs: %v", err)
	}
	time.Sleep(time.Second)
	vars, err := efi.OpenVars("")
	if err != nil {
		return err
	}
	boot, err := vars.Boot()
	if err != nil {
		return err
	}
	for _, n := range boot.Order {
		for _, e := range boot.Entries {
			if e.Number == n {
				say("order %04X %q %s %s", n, e.Title, e.File, e.Part.ID)
			}
		}
	}
	loader, err := vars.Loader()
	if err != nil {
		return err
	}
	disks := func() []fleet.Disk { return facts.Read(os.DirFS("/")).Disks }
	for _, d := range disks() {
		say("disk %s serial %q model %q %d bytes", d.Path, d.Serial, d.Model, d.SizeBytes)
	}
	if loader.Entry != "" {
		say("STARTED by the loader: %s counts in %s", loader.Entry, loader.CountPath)
		return nil
	}
	var target, files *fleet.Disk
	all := disks()
	for i := range all {
		switch all[i].Serial {
		case "TARGET":
			target = &all[i]
		case "BLOBS":
			files = &all[i]
		}
	}
	if target == nil || files == nil {
		return fmt.Errorf("the disks are not there")
	}
	f, err := os.Open(files.Path)
	if err != nil {
		return err
	}
	head := make([]byte, 1<<20)
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	var ix index
	if err := json.Unmarshal(bytes.TrimRight(head, "\x00"), &ix); err != nil {
		return err
	}
	keys, err := statement.ParseKeys([]byte(ix.Key))
	if err != nil {
		return err
	}
	sum, err := hex.DecodeString(ix.Image)
	if err != nil {
		return err
	}
	const node = fleet.NodeID("n-aaaaaaaaaaaaaaaaaaaaaaaa")
	order := fleet.Order{ID: "o-1", Node: node, Kind: fleet.OrderInstall, NotAfter: time.Now().Add(time.Hour),
		Disk:  &fleet.DiskTarget{Serial: target.Serial, WWN: target.WWN, Model: target.Model, SizeBytes: target.SizeBytes},
		Image: &fleet.ImageRef{Name: "edge", Version: "1", Arch: "amd64", SHA256: sum}}
	src := source{f, ix}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var in *install.Installer
	last := ""
	in, err = install.New(install.Config{
		Node: node, Arch: "amd64", ReleaseKeys: []crypto.PublicKey(keys), Machine: install.Host{Run: "/run", NeedModule: func(m string) error { return load(m, 0) }, Disks: disks},
		Disks: disks, Orders: func() []fleet.Order { return []fleet.Order{order} }, Withdrawn: func(string) bool { return false },
		TimeKnown: func() bool { return true }, Now: time.Now, Sources: func() []install.Source { return []install.Source{src} },
		HandOver: func() (install.HandOver, string) {
			return install.HandOver{Site: []byte("{}"), Identity: []byte("{}"), Documents: [][]byte{[]byte("x")}}, ""
		},
		Tell:  func(id string, s fleet.OrderState, text string) { say("order %s is %s: %s", id, s, text) },
		Heard: func(context.Context) {},
		Restart: func(why string) {
			say("RESTART: %s", why)
			unix.Sync()
			time.Sleep(500 * time.Millisecond)
			_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		},
		Shows: func() {
			n := in.Now()
			if s := fmt.Sprintf("%s %d %%: %s", n.State, n.Percent/20*20, n.Reason); s != last {
				last = s
				say("%s", s)
			}
		},
	})
	if err != nil {
		return err
	}
	return in.Run(ctx)
}

// source is the disk with the files.
type source struct {
	f  *os.File
	ix index
}

func (s source) Name() string { return "the second disk" }

func (s source) Open(_ context.Context, d fetch.Digest, off, n int64) (io.ReadCloser, error) {
	at, ok := s.ix.Blobs[hex.EncodeToString(d[:])]
	if !ok {
		return nil, fetch.ErrMissing
	}
	return io.NopCloser(io.NewSectionReader(s.f, at+off, n)), nil
}

func (s source) Manifest(context.Context, fetch.Digest, int64) ([]byte, error) {
	return s.ix.Manifest, nil
}

var loaded = map[string]bool{}

// load loads a module with what it needs.
func load(name string, depth int) error {
	if depth > 8 {
		return fmt.Errorf("too deep")
	}
	deps, err := filepath.Glob("/lib/modules/*/modules.dep")
	if err != nil || len(deps) == 0 {
		return fmt.Errorf("no modules.dep")
	}
	b, err := os.ReadFile(deps[0])
	if err != nil {
		return err
	}
	dir := filepath.Dir(deps[0])
	for _, line := range strings.Split(string(b), "\n") {
		file, needs, _ := strings.Cut(line, ":")
		base, _, _ := strings.Cut(filepath.Base(file), ".ko")
		if strings.ReplaceAll(base, "-", "_") != name {
			continue
		}
		if loaded[file] {
			return nil
		}
		loaded[file] = true
		for _, n := range strings.Fields(needs) {
			nb, _, _ := strings.Cut(filepath.Base(n), ".ko")
			if err := load(strings.ReplaceAll(nb, "-", "_"), depth+1); err != nil {
				return err
			}
		}
		f, err := os.Open(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			return fmt.Errorf("%s: %w", file, err)
		}
		return nil
	}
	return nil // built in
}
