package efi

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/google/uuid"
	"github.com/u-root/u-root/pkg/efivarfs"

	"github.com/muster-edge/muster/firmware"
)

// Store holds variables: efivarfs of u-root, or a map in tests.
type Store interface {
	Get(efivarfs.VariableDescriptor) (efivarfs.VariableAttributes, []byte, error)
	Set(efivarfs.VariableDescriptor, efivarfs.VariableAttributes, []byte) error
	Remove(efivarfs.VariableDescriptor) error
	List() ([]efivarfs.VariableDescriptor, error)
}

// The firmware's own variables (UEFI 2.10 section 3.3) and those of the Boot
// Loader Interface (systemd.io/BOOT_LOADER_INTERFACE).
var (
	globalGUID = uuid.MustParse("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	loaderGUID = uuid.MustParse("4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
)

// kept are the attributes of everything we write.
const kept = efivarfs.AttributeNonVolatile | efivarfs.AttributeBootserviceAccess | efivarfs.AttributeRuntimeAccess

// maxVars bounds how many variables are looked at.
const maxVars = 4096

// Vars are the firmware's variables.
type Vars struct{ store Store }

// OpenVars opens the variables mounted at dir, "" is the usual place.
func OpenVars(dir string) (*Vars, error) {
	if dir == "" {
		dir = efivarfs.DefaultVarFS
	}
	s, err := efivarfs.NewPath(dir)
	if err != nil {
		return nil, fmt.Errorf("efi: open variables: %w (was this machine started by UEFI?)", err)
	}
	return &Vars{s}, nil
}

// VarsOn are variables kept elsewhere.
func VarsOn(s Store) *Vars { return &Vars{s} }

func (v *Vars) read(name string, g uuid.UUID, most int) ([]byte, error) {
	_, b, err := v.store.Get(efivarfs.VariableDescriptor{Name: name, GUID: g})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("efi: read %s: %w", name, err)
	}
	if len(b) > most {
		return nil, fmt.Errorf("efi: read %s: %d bytes", name, len(b))
	}
	return b, nil
}

func (v *Vars) write(name string, g uuid.UUID, b []byte) error {
	if err := v.store.Set(efivarfs.VariableDescriptor{Name: name, GUID: g}, kept, b); err != nil {
		return fmt.Errorf("efi: write %s: %w", name, err)
	}
	return nil
}

func (v *Vars) remove(name string, g uuid.UUID) error {
	err := v.store.Remove(efivarfs.VariableDescriptor{Name: name, GUID: g})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("efi: remove %s: %w", name, err)
	}
	return nil
}

// Boot is what the firmware would start, in its order.
type Boot struct {
	Entries []firmware.BootEntry
	// Unread are the numbers of entries that make no sense.
	Unread []uint16
	Order  []uint16
	// Current is the entry of this start, if Started.
	Current uint16
	Started bool
}

// Boot reads all Boot#### and BootOrder. Nothing is changed; what a board wrote
// wrongly is left out and listed.
func (v *Vars) Boot() (Boot, error) {
	all, err := v.store.List()
	if err != nil {
		return Boot{}, fmt.Errorf("efi: list variables: %w", err)
	}
	var b Boot
	for i, d := range all {
		if i >= maxVars || len(b.Entries)+len(b.Unread) >= firmware.MaxBootEntries {
			break
		}
		n, ok := bootNumber(d)
		if !ok {
			continue
		}
		raw, err := v.read(d.Name, globalGUID, firmware.MaxBootEntry)
		var e firmware.BootEntry
		if err == nil {
			e, err = firmware.ParseBootEntry(n, raw)
		}
		if err != nil {
			b.Unread = append(b.Unread, n)
			continue
		}
		b.Entries = append(b.Entries, e)
	}
	raw, err := v.read("BootOrder", globalGUID, 1<<16)
	if err != nil {
		return Boot{}, err
	}
	b.Order = firmware.ParseBootOrder(raw)
	if cur, err := v.read("BootCurrent", globalGUID, 2); err == nil && len(cur) == 2 {
		b.Current, b.Started = firmware.ParseBootOrder(cur)[0], true
	}
	return b, nil
}

func bootNumber(d efivarfs.VariableDescriptor) (uint16, bool) {
	if d.GUID != globalGUID || len(d.Name) != 8 || d.Name[:4] != "Boot" {
		return 0, false
	}
	n, err := strconv.ParseUint(d.Name[4:], 16, 16)
	// Small letters are no boot entries (UEFI 2.10 section 3.3).
	return uint16(n), err == nil && d.Name == fmt.Sprintf("Boot%04X", n)
}

// SetBoot makes the firmware start want first, then the network, then the
// rest. It writes only what differs: boards wear out, and some lose room with
// each write. It returns how many variables it changed.
func (v *Vars) SetBoot(want []firmware.BootEntry) (changed int, err error) {
	b, err := v.Boot()
	if err != nil {
		return 0, err
	}
	plan, err := firmware.PlanBootOrder(b.Entries, b.Unread, b.Order, want)
	if err != nil {
		return 0, err
	}
	for _, e := range plan.Write {
		raw, err := e.Encode()
		if err != nil {
			return changed, err
		}
		if err := v.write(fmt.Sprintf("Boot%04X", e.Number), globalGUID, raw); err != nil {
			return changed, err
		}
		changed++
	}
	if plan.Changed {
		if err := v.write("BootOrder", globalGUID, firmware.EncodeBootOrder(plan.Order)); err != nil {
			return changed, err
		}
		changed++
	}
	for _, n := range plan.Remove {
		if err := v.remove(fmt.Sprintf("Boot%04X", n), globalGUID); err != nil {
			return changed, err
		}
		changed++
	}
	return changed, nil
}

// Loader is what the boot loader and the stub said of this start.
type Loader struct {
	// Entry is the ID that was started, with its counter at that time.
	Entry string
	// CountPath is the file that counts, with slashes; "" when this start is
	// not counted.
	CountPath string
	// ESP is the partition that the image came from; zero: not from a disk.
	ESP firmware.GUID
	// OneShot and Default are the choices for the next start.
	OneShot, Default string
}

// Loader reads the variables of the Boot Loader Interface.
func (v *Vars) Loader() (Loader, error) {
	var l Loader
	var errs []error
	get := func(name string) string {
		b, err := v.read(name, loaderGUID, 4<<10)
		errs = append(errs, err)
		return firmware.ParseLoaderText(b)
	}
	l.Entry = get("LoaderEntrySelected")
	l.CountPath = slashes(get("LoaderBootCountPath"))
	if g, err := firmware.ParseGUID(get("LoaderDevicePartUUID")); err == nil {
		l.ESP = g
	}
	l.OneShot, l.Default = get("LoaderEntryOneShot"), get("LoaderEntryDefault")
	return l, errors.Join(errs...)
}

func slashes(s string) string {
	out := []byte(s)
	for i, c := range out {
		if c == '\\' {
			out[i] = '/'
		}
	}
	if len(out) > 0 && out[0] == '/' {
		out = out[1:]
	}
	return string(out)
}

// SetOneShot makes the loader start what matches the pattern, once; "" takes
// that back.
func (v *Vars) SetOneShot(pattern string) error {
	if pattern == "" {
		return v.remove("LoaderEntryOneShot", loaderGUID)
	}
	return v.write("LoaderEntryOneShot", loaderGUID, firmware.LoaderText(pattern))
}

// SetNext makes the firmware start the entry once, before its order.
func (v *Vars) SetNext(number uint16) error {
	return v.write("BootNext", globalGUID, firmware.EncodeBootOrder([]uint16{number}))
}
