// Package text makes strings from machines and strangers safe to store, to
// show and to compare. A serial number, a DHCP host name or a TPM vendor
// string may hold terminal escapes, text that runs backwards, markup, or a
// spreadsheet formula; whoever looks at the approval queue must see what is
// there and nothing else.
//
// Clean is applied once, where the string enters. The For functions are
// applied where it leaves. HTML is left to html/template.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
)

// Clean returns s as at most max bytes of valid UTF-8 on one line, without
// control characters (C0, DEL, C1), terminal escape sequences, bidirectional
// controls, zero-width and other invisible characters, private-use and
// unassigned code points. Line breaks and tabs become one space, runs of
// spaces too; ends are trimmed. A cut falls between characters.
//
// Clean(Clean(s)) == Clean(s). A max above 1 MiB counts as 1 MiB.
func Clean(s string, max int) string {
	// What a machine sends is bounded elsewhere; this bounds the work here.
	// Every kept byte needs at most a few dropped ones in honest text.
	max = min(max, maxClean)
	if limit := 64*max + 1024; max >= 0 && len(s) > limit {
		s = s[:limit]
	}
	var b strings.Builder
	space := false
	for i := 0; i < len(s); {
		if n := escape(s[i:]); n > 0 {
			i += n
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		i += n
		if r == utf8.RuneError && n == 1 {
			continue
		}
		if unicode.IsSpace(r) || r == '\u2028' || r == '\u2029' {
			space = b.Len() > 0
			continue
		}
		if hidden(r) {
			continue
		}
		need := utf8.RuneLen(r)
		if space {
			need++
		}
		if b.Len()+need > max {
			break
		}
		if space {
			b.WriteByte(' ')
			space = false
		}
		b.WriteRune(r)
	}
	return b.String()
}

const maxClean = 1 << 20

// escape returns the length of the terminal escape sequence (ECMA-48) that s
// starts with, 0 if none. Sequences are removed whole: without their ESC the
// parameters would stay as rubbish in the text.
func escape(s string) int {
	var body string
	var intro byte
	switch {
	case len(s) >= 2 && s[0] == 0x1b:
		intro, body = s[1], s[2:]
	case strings.HasPrefix(s, "\u009b"): // CSI as C1 control
		intro, body = '[', s[2:]
	case strings.HasPrefix(s, "\u009d"): // OSC
		intro, body = ']', s[2:]
	case strings.HasPrefix(s, "\u0090"): // DCS
		intro, body = 'P', s[2:]
	default:
		return 0
	}
	taken := len(s) - len(body)
	switch intro {
	case '[': // parameters 0x30-0x3F, intermediates 0x20-0x2F, final 0x40-0x7E
		for i := range min(len(body), 64) {
			switch c := body[i]; {
			case c >= 0x40 && c <= 0x7e:
				return taken + i + 1
			case c < 0x20 || c > 0x7e:
				return taken + i
			}
		}
		return taken
	case ']', 'P', '_', '^', 'X': // strings, ended by BEL or ST
		for i := range min(len(body), 256) {
			if body[i] == 0x07 {
				return taken + i + 1
			}
			if strings.HasPrefix(body[i:], "\x1b\\") || strings.HasPrefix(body[i:], "\u009c") {
				return taken + i + 2
			}
		}
		return taken
	}
	if intro >= 0x20 && intro <= 0x7e {
		return taken
	}
	return 1
}

// hidden reports characters that a person does not see or that change how
// others are seen.
func hidden(r rune) bool {
	switch {
	case !unicode.IsGraphic(r): // Cc, Cf, Cs, Co, Cn and line separators
		return true
	case unicode.Is(unicode.Bidi_Control, r), unicode.Is(unicode.Variation_Selector, r),
		unicode.Is(unicode.Other_Default_Ignorable_Code_Point, r):
		return true
	case r == '\u2800', r == '\ufffd': // BRAILLE PATTERN BLANK; replacement
		return true
	case unicode.Is(unicode.Mn, r), unicode.Is(unicode.Me, r):
		// Combining marks can be piled up to cover other lines. Text in NFC
		// rarely needs them, and hardware never does.
		return true
	}
	return false
}

// Limits of CleanHardware.
const (
	MaxField   = 128
	MaxNICs    = 32
	MaxDisks   = 64
	MaxDevices = 128
	maxAddress = 16
)

// CleanHardware returns h with every string cleaned to MaxField bytes, lists
// cut to MaxNICs, MaxDisks and MaxDevices, and numbers that make no sense set
// to 0. It shares no memory with h.
func CleanHardware(h fleet.Hardware) fleet.Hardware {
	for _, s := range []*string{
		&h.Vendor, &h.Product, &h.Serial, &h.UUID, &h.BoardVendor, &h.Board, &h.BoardSerial,
		&h.BIOSVendor, &h.BIOSVersion, &h.BIOSDate, &h.CPU, &h.TPMVendor, &h.TPMModel,
		&h.TPMFirmware, &h.BootPath, &h.Image, &h.Version,
	} {
		*s = Clean(*s, MaxField)
	}
	h.CPUs = sane(h.CPUs)
	h.MemoryBytes = sane(h.MemoryBytes)
	h.NICs = copied(h.NICs, MaxNICs, func(n *fleet.NIC) {
		n.Name, n.MAC, n.Driver = Clean(n.Name, MaxField), Clean(n.MAC, MaxField), Clean(n.Driver, MaxField)
		n.SpeedMbit = sane(n.SpeedMbit)
		n.Addresses = copied(n.Addresses, maxAddress, func(a *string) { *a = Clean(*a, MaxField) })
	})
	h.Disks = copied(h.Disks, MaxDisks, func(d *fleet.Disk) {
		for _, s := range []*string{&d.Path, &d.Model, &d.Serial, &d.WWN, &d.Transport} {
			*s = Clean(*s, MaxField)
		}
		d.SizeBytes = sane(d.SizeBytes)
	})
	h.Devices = copied(h.Devices, MaxDevices, func(d *fleet.Device) {
		for _, s := range []*string{&d.Bus, &d.Vendor, &d.Device, &d.Class, &d.Driver} {
			*s = Clean(*s, MaxField)
		}
	})
	return h
}

func copied[T any](list []T, n int, clean func(*T)) []T {
	if len(list) == 0 {
		return nil
	}
	out := append([]T(nil), list[:min(n, len(list))]...)
	for i := range out {
		clean(&out[i])
	}
	return out
}

// sane drops negative counts and sizes.
func sane[T int | int64](n T) T { return max(n, 0) }
