package install

import (
	"errors"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
)

// Why gathers how this machine came into recovery. It reads: the record of a
// disk with our partitions, the names on its ESP, the variables of this start.
// Nothing is written, and only a disk that carries our labels is opened at all.
func (h Host) Why() firmware.RecoveryFacts {
	var f firmware.RecoveryFacts
	if v, err := efi.OpenVars(efivars); err == nil {
		f.Loader, f.Entry = startedBy(v)
	}
	for _, d := range h.Disks() {
		parts, err := disk.Parts("/", filepath.Base(d.Path))
		if err != nil || parts[firmware.LabelMeta] == "" || parts[firmware.LabelRootA] == "" || parts[firmware.LabelESP] == "" {
			continue
		}
		found := firmware.RecoveryFacts{Loader: f.Loader, Entry: f.Entry, Ours: true}
		if err := h.record(d, &found.Meta); err != nil {
			found.MetaWhy = firstLine(err)
		}
		if found.Files, err = h.bootFiles(d); err != nil {
			found.FilesWhy = firstLine(err)
		}
		// Of several, one with a record.
		if !f.Ours || f.MetaWhy != "" {
			f = found
		}
	}
	return f
}

// startedBy says which entry the loader chose and which one the firmware did.
func startedBy(v *efi.Vars) (loader, title string) {
	if l, err := v.Loader(); err == nil {
		loader = l.Entry
	}
	b, err := v.Boot()
	if err != nil || !b.Started {
		return loader, ""
	}
	for _, e := range b.Entries {
		if e.Number == b.Current {
			title = e.Title
		}
	}
	return loader, title
}

func (h Host) record(d fleet.Disk, m *firmware.Meta) error {
	dev, err := h.Part(d, firmware.LabelMeta)
	if err != nil {
		return err
	}
	*m, err = disk.ReadMeta(dev)
	return errors.Join(err, dev.Close())
}

func (h Host) bootFiles(d fleet.Disk) (files []firmware.BootFile, err error) {
	on, umount, err := h.mount(d, unix.MS_RDONLY)
	if err != nil {
		return nil, err
	}
	files, err = efi.On(on).BootFiles()
	return files, errors.Join(err, umount())
}

func firstLine(err error) string {
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}
