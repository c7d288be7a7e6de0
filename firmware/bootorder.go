package firmware

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// GUID is a GUID in the byte order of UEFI and GPT: the first three fields are
// little-endian.
type GUID [16]byte

// String returns the usual text, in lower case.
func (g GUID) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[:]), binary.LittleEndian.Uint16(g[4:]), binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:])
}

// ParseGUID reads the usual text.
func ParseGUID(s string) (g GUID, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(s) != 36 || len(b) != 16 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return g, fmt.Errorf("firmware: read GUID: %.40q is none", s)
	}
	slices.Reverse(b[:4])
	slices.Reverse(b[4:6])
	slices.Reverse(b[6:8])
	return GUID(b), nil
}

// Limits of boot entries. Boards show about ten; a hostile one may show
// anything.
const (
	// MaxBootEntries is how many Boot#### variables are looked at.
	MaxBootEntries = 256
	// MaxBootEntry bounds one of them.
	MaxBootEntry = 16 << 10
	maxBootText  = 512
)

// BootEntry is a Boot#### variable (EFI_LOAD_OPTION, UEFI 2.10 section 3.1.3),
// as far as we care.
type BootEntry struct {
	// Number is the #### of its name.
	Number uint16
	// Active entries are tried by the firmware.
	Active bool
	// Title is what the setup menu shows.
	Title string
	// Part and File: a file on a GPT partition. File has slashes.
	Part PartRef
	File string
	// Network: its path leads through a network card.
	Network bool
}

// PartRef says where a partition is, as a device path needs it. LBAs are those
// of the disk's logical sectors.
type PartRef struct {
	Number         uint32
	Start, Sectors uint64
	ID             GUID
}

const (
	loadActive = 1

	pathMessaging = 3
	pathMedia     = 4
	pathEnd       = 0x7f

	mediaHardDrive = 1
	mediaFile      = 4
	hardDriveSize  = 42
)

// Encode returns the variable's data.
func (e BootEntry) Encode() ([]byte, error) {
	if e.File == "" || e.Network {
		return nil, errors.New("firmware: write boot entry: only files on a partition are written")
	}
	if len(e.Title) > maxBootText || len(e.File) > maxBootText {
		return nil, errors.New("firmware: write boot entry: title or file is too long")
	}
	le := binary.LittleEndian
	var p []byte
	p = append(p, pathMedia, mediaHardDrive, hardDriveSize, 0)
	p = le.AppendUint32(p, e.Part.Number)
	p = le.AppendUint64(p, e.Part.Start)
	p = le.AppendUint64(p, e.Part.Sectors)
	p = append(p, e.Part.ID[:]...)
	p = append(p, 2, 2) // GPT, signature is a GUID
	name := ucs2("\\" + strings.ReplaceAll(strings.TrimPrefix(e.File, "/"), "/", "\\"))
	p = append(p, pathMedia, mediaFile)
	p = le.AppendUint16(p, uint16(4+len(name)))
	p = append(p, name...)
	p = append(p, pathEnd, 0xff, 4, 0)
	var out []byte
	flags := uint32(0)
	if e.Active {
		flags = loadActive
	}
	out = le.AppendUint32(out, flags)
	out = le.AppendUint16(out, uint16(len(p)))
	out = append(out, ucs2(e.Title)...)
	return append(out, p...), nil
}

// ucs2 is s in UTF-16LE with a NUL at its end.
func ucs2(s string) []byte {
	var out []byte
	for _, c := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, c)
	}
	return append(out, 0, 0)
}

// LoaderText is s as the boot loader interface writes text into variables.
func LoaderText(s string) []byte { return ucs2(s) }

// ParseLoaderText reads such text, at most 512 bytes of it.
func ParseLoaderText(b []byte) string {
	s, _, _ := text16(b[:min(len(b), 2*maxBootText)])
	return s
}

// text16 reads UTF-16LE up to a NUL or the end.
func text16(b []byte) (s string, rest []byte, ended bool) {
	var c []uint16
	for len(b) >= 2 {
		x := binary.LittleEndian.Uint16(b)
		b = b[2:]
		if x == 0 {
			return string(utf16.Decode(c)), b, true
		}
		c = append(c, x)
	}
	return string(utf16.Decode(c)), nil, false
}

// ParseBootEntry reads a Boot#### variable. What is not understood leaves
// fields empty; only what cannot be an entry at all is an error.
func ParseBootEntry(number uint16, b []byte) (BootEntry, error) {
	e := BootEntry{Number: number}
	if len(b) < 8 || len(b) > MaxBootEntry {
		return e, fmt.Errorf("firmware: read Boot%04X: %d bytes", number, len(b))
	}
	e.Active = b[0]&loadActive != 0
	size := int(binary.LittleEndian.Uint16(b[4:]))
	title, rest, ok := text16(b[6:])
	if !ok || size > len(rest) {
		return e, fmt.Errorf("firmware: read Boot%04X: it does not end where it says", number)
	}
	e.Title = title[:min(len(title), maxBootText)]
	path := rest[:size]
	for len(path) >= 4 {
		n := int(binary.LittleEndian.Uint16(path[2:]))
		if n < 4 || n > len(path) || path[0] == pathEnd {
			break
		}
		body := path[4:n]
		switch kind, sub := path[0], path[1]; {
		case kind == pathMessaging && slices.Contains([]byte{11, 12, 13, 24}, sub): // MAC, IPv4, IPv6, URI
			e.Network = true
		case kind == pathMedia && sub == mediaHardDrive && n == hardDriveSize && body[36] == 2 && body[37] == 2:
			e.Part = PartRef{Number: binary.LittleEndian.Uint32(body), Start: binary.LittleEndian.Uint64(body[4:]),
				Sectors: binary.LittleEndian.Uint64(body[12:]), ID: GUID(body[20:36])}
		case kind == pathMedia && sub == mediaFile:
			s, _, _ := text16(body)
			s = strings.TrimPrefix(strings.ReplaceAll(s, "\\", "/"), "/")
			e.File = s[:min(len(s), maxBootText)]
		}
		path = path[n:]
	}
	return e, nil
}

// ParseBootOrder reads the variable BootOrder; odd bytes at its end are
// dropped, and so is what comes twice.
func ParseBootOrder(b []byte) []uint16 {
	var out []uint16
	for len(b) >= 2 && len(out) < MaxBootEntries {
		if n := binary.LittleEndian.Uint16(b); !slices.Contains(out, n) {
			out = append(out, n)
		}
		b = b[2:]
	}
	return out
}

// EncodeBootOrder is the other way.
func EncodeBootOrder(order []uint16) []byte {
	var out []byte
	for _, n := range order {
		out = binary.LittleEndian.AppendUint16(out, n)
	}
	return out
}

// Titles of our entries. An entry with such a title is ours.
const (
	TitleLoader   = "muster"
	TitleCopy     = "muster (copy)"
	TitleRecovery = "muster recovery"
)

// Where the loader and its copy lie on the ESP. The copy is what firmware
// starts from a disk whose entries were lost (UEFI 2.10 section 3.5.1.1).
const (
	LoaderFile = "EFI/systemd/systemd-bootx64.efi"
	LoaderCopy = "EFI/BOOT/BOOTX64.EFI"
)

// RecoveryPattern matches the boot file of the recovery image, for a one-shot
// choice of the loader.
const RecoveryPattern = "recovery-*"

const recoveryPrefix = "recovery-"

// RecoveryEntry is its name below EFI/Linux. A plus would be read as a counter,
// and the loader must never count down what comes last.
func RecoveryEntry(version string) string {
	return recoveryPrefix + strings.ReplaceAll(version, "+", "_") + ".efi"
}

// IsRecovery says whether a boot file, hidden or not, is a recovery image by its
// name.
func IsRecovery(name string) bool {
	return strings.HasPrefix(strings.ToLower(strings.TrimPrefix(name, StagedPrefix)), recoveryPrefix)
}

// BootEntries are the entries of a disk installed by us, in their order.
// recovery is the name of the recovery image's boot file, "" for none.
func BootEntries(esp PartRef, recovery string) []BootEntry {
	out := []BootEntry{
		{Active: true, Title: TitleLoader, Part: esp, File: LoaderFile},
		{Active: true, Title: TitleCopy, Part: esp, File: LoaderCopy},
	}
	if recovery != "" {
		out = append(out, BootEntry{Active: true, Title: TitleRecovery, Part: esp, File: "EFI/Linux/" + recovery})
	}
	return out
}

// BootPlan is what changes of the firmware's variables make its order right.
// Write comes first, then Order, then Remove, so that every moment between
// has an order that starts something.
type BootPlan struct {
	Write  []BootEntry
	Order  []uint16
	Remove []uint16
	// Changed: Order differs from what is there.
	Changed bool
}

// Empty says that everything is as it should be.
func (p BootPlan) Empty() bool { return len(p.Write) == 0 && !p.Changed && len(p.Remove) == 0 }

// PlanBootOrder puts want first, then the network, then everything else as it
// was. Entries with one of our titles that lead elsewhere are of a disk that
// was replaced, and go. Numbers of entries that could not be read are taken.
func PlanBootOrder(have []BootEntry, taken, order []uint16, want []BootEntry) (BootPlan, error) {
	var p BootPlan
	used := map[uint16]bool{}
	for _, n := range append(slices.Clone(taken), order...) {
		used[n] = true
	}
	for _, e := range have {
		used[e.Number] = true
	}
	ours := func(e BootEntry) bool {
		return slices.ContainsFunc(want, func(w BootEntry) bool { return w.Title == e.Title })
	}
	done := map[uint16]bool{}
	var first []uint16
	for _, w := range want {
		i := slices.IndexFunc(have, func(e BootEntry) bool {
			w.Number = e.Number
			return e == w && !done[e.Number]
		})
		if i < 0 {
			// One of ours that leads elsewhere is written over: boards with
			// little NVRAM do not give room back at once.
			i = slices.IndexFunc(have, func(e BootEntry) bool { return e.Title == w.Title && !done[e.Number] })
			if i >= 0 {
				w.Number = have[i].Number
			} else {
				n := 0
				for n <= 0xffff && used[uint16(n)] {
					n++
				}
				if n > 0xffff {
					return BootPlan{}, errors.New("firmware: plan boot order: every number is taken")
				}
				w.Number = uint16(n)
			}
			p.Write = append(p.Write, w)
		} else {
			w.Number = have[i].Number
		}
		used[w.Number], done[w.Number] = true, true
		first = append(first, w.Number)
	}
	var network, rest []uint16
	for _, n := range order {
		i := slices.IndexFunc(have, func(e BootEntry) bool { return e.Number == n })
		switch {
		case done[n]:
		case i >= 0 && ours(have[i]):
		case i >= 0 && have[i].Network:
			network = append(network, n)
		default:
			rest = append(rest, n)
		}
	}
	for _, e := range have {
		if ours(e) && !done[e.Number] {
			p.Remove = append(p.Remove, e.Number)
		}
	}
	p.Order = slices.Concat(first, network, rest)
	p.Changed = !slices.Equal(p.Order, order)
	return p, nil
}
