package bootmodel

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/muster-edge/muster/firmware"
)

// File is one file of an ESP, as far as booting goes.
type File struct {
	// Starts: the firmware can load it and lets it start: it is whole, and
	// signed where Secure Boot asks for that.
	Starts bool
	// Garbled: not even its headers are those of a program, so that
	// systemd-boot passes it over without counting.
	Garbled bool
	// Loader: it is systemd-boot.
	Loader bool
	// Release is its .osrel section; nil: none.
	Release *Release
	// Text is the content of loader/loader.conf.
	Text string
}

// Release is what systemd-boot reads of .osrel (os-release(5)).
type Release struct {
	ID, ImageID                      string
	VersionID, ImageVersion, BuildID string
	PrettyName                       string
}

// ESP holds files by path, with slashes and without a leading one. Paths
// differ by more than case.
type ESP map[string]File

// LoaderConf is where systemd-boot reads its settings.
const LoaderConf = "loader/loader.conf"

// DefaultPath is what firmware starts from a disk that no variable names
// (UEFI 2.10, 3.5.1.1).
const DefaultPath = "EFI/BOOT/BOOTX64.EFI"

// Target is one entry of the firmware's BootOrder.
type Target struct {
	// File on the ESP; DefaultPath for the disk itself. Or:
	File string
	// Network boot.
	Network bool
}

// Machine is all that decides what starts.
type Machine struct {
	ESP ESP
	// ReadOnly: the ESP cannot be written.
	ReadOnly bool
	// Order is the firmware's BootOrder. Firmware adds the disk (DefaultPath)
	// and the network behind it, if these are not there.
	Order []Target
	// OneShot and Default are systemd-boot's variables LoaderEntryOneShot and
	// LoaderEntryDefault.
	OneShot, Default string
}

// Outcome is how a power-on ended.
type Outcome struct {
	// File that runs, "" if none.
	File string
	// Network: nothing on the disk started.
	Network bool
	// Menu: systemd-boot shows its menu and waits for a person.
	Menu bool
	// Steps in words.
	Steps []string
}

// PowerOn says what starts and what changes on the way. pressed: a key came
// while the loader looked for one. What m becomes is what the machine will be
// at its next power-on if what runs changes nothing.
func (m *Machine) PowerOn(pressed bool) Outcome {
	var out Outcome
	order := slices.Clone(m.Order)
	if !slices.Contains(order, Target{File: DefaultPath}) {
		order = append(order, Target{File: DefaultPath})
	}
	if !slices.ContainsFunc(order, func(t Target) bool { return t.Network }) {
		order = append(order, Target{Network: true})
	}
	for _, t := range order {
		if t.Network {
			out.note("the firmware boots from the network")
			out.Network = true
			return out
		}
		name, f, ok := m.ESP.find(t.File)
		switch {
		case !ok:
			out.note("the firmware finds no %s", t.File)
		case !f.Starts:
			out.note("the firmware refuses %s", name)
		case !f.Loader:
			out.note("the firmware starts %s", name)
			out.File = name
			return out
		default:
			out.note("the firmware starts the loader %s", name)
			if m.load(pressed, &out) {
				return out
			}
		}
	}
	return out
}

func (o *Outcome) note(format string, a ...any) { o.Steps = append(o.Steps, fmt.Sprintf(format, a...)) }

func (e ESP) find(file string) (string, File, bool) {
	if f, ok := e[file]; ok {
		return file, f, true
	}
	for _, name := range slices.Sorted(maps.Keys(e)) {
		if strings.EqualFold(name, file) {
			return name, e[name], true
		}
	}
	return "", File{}, false
}

// Sorted returns the entries as systemd-boot lists them.
func (e ESP) Sorted() []Entry {
	var out []Entry
	for _, name := range slices.Sorted(maps.Keys(e)) {
		if !strings.EqualFold(path.Dir(name), Entries) {
			continue
		}
		if x := entryOf(name, e[name]); x != nil {
			out = append(out, *x)
		}
	}
	slices.SortStableFunc(out, Entry.Compare)
	return out
}

// load is systemd-boot: true if something runs or the menu is open, false if
// it went back to the firmware.
func (m *Machine) load(pressed bool, out *Outcome) bool {
	conf := parseConf(m.ESP)
	entries := m.ESP.Sorted()
	oneShot := m.OneShot
	m.OneShot = "" // erased before it is used, so that it is used once
	if len(entries) == 0 {
		out.note("the loader finds no entry")
		return false
	}
	if pressed && !conf.disabled || conf.menu {
		out.note("a key was pressed: the loader shows its menu")
		out.Menu = true
		return true
	}
	choice := entries[0]
	for _, pattern := range []string{oneShot, m.Default, conf.defaults} {
		if i := slices.IndexFunc(entries, func(e Entry) bool { return matches(pattern, e.ID) }); pattern != "" && i >= 0 {
			choice = entries[i]
			break
		}
	}
	f := m.ESP[choice.File]
	name := choice.File
	if choice.Left >= 0 {
		// A spent entry that is started all the same counts on.
		base, left, done := Counter(path.Base(choice.File))
		next := path.Join(path.Dir(choice.File), firmware.CountedName(base, max(left-1, 0), done+1))
		if m.ReadOnly {
			out.note("the loader cannot count %s", choice.File)
		} else {
			delete(m.ESP, choice.File)
			m.ESP[next] = f
			name = next
			out.note("the loader counts: %s", path.Base(next))
		}
	}
	if !f.Starts {
		out.note("the loader cannot start %s and goes back to the firmware", name)
		return false
	}
	out.note("the loader starts %s", name)
	out.File = name
	return true
}

type conf struct {
	defaults string
	// menu: always; disabled: never, whatever is pressed.
	menu, disabled bool
}

// parseConf reads the settings that matter: with "menu-force" the loader stays
// in its menu; "menu-disabled" (since version 255) makes it deaf to keys.
func parseConf(e ESP) conf {
	var c conf
	_, f, _ := e.find(LoaderConf)
	for _, line := range strings.Split(f.Text, "\n") {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSpace(value)
		switch key {
		case "default":
			c.defaults = value
		case "timeout":
			c.menu, c.disabled = value == "menu-force", value == "menu-disabled"
		}
	}
	return c
}

// matches is the firmware-style pattern match of systemd-boot: "*" and "?",
// without regard to case.
func matches(pattern, id string) bool {
	ok, err := path.Match(strings.ToLower(pattern), strings.ToLower(id))
	return err == nil && ok
}
