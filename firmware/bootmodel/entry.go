package bootmodel

import (
	"cmp"
	"path"
	"strconv"
	"strings"
)

// Entries is the folder in which systemd-boot looks for unified kernel images
// (UAPI boot loader specification, "Type #2").
const Entries = "EFI/Linux"

// Entry is one choice of systemd-boot.
type Entry struct {
	// File is the path on the ESP now.
	File string
	// ID is the file's name: with its counter, so that an ID changes with each
	// attempt and must never be stored.
	ID string
	// SortKey and Version come from .osrel.
	SortKey, Version string
	// Left and Done are the counter; Left is -1 for an entry without.
	Left, Done int
}

// Counter splits a file name into what stays and its counter: "a+3-1.efi" is
// "a.efi", 3, 1. left is -1 when there is none (Automatic Boot Assessment).
func Counter(name string) (base string, left, done int) {
	stem, ok := cutSuffixFold(name, ".efi")
	if !ok {
		return name, -1, 0
	}
	ext := name[len(stem):]
	i := strings.LastIndexByte(stem, '+')
	if i < 0 {
		return name, -1, 0
	}
	l, d, both := strings.Cut(stem[i+1:], "-")
	left, ok = digits(l)
	if !ok {
		return name, -1, 0
	}
	if both {
		if done, ok = digits(d); !ok {
			return name, -1, 0
		}
	}
	return stem[:i] + ext, left, done
}

func digits(s string) (int, bool) {
	if s == "" || len(s) > 9 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

func cutSuffixFold(s, suffix string) (string, bool) {
	if len(s) < len(suffix) || !strings.EqualFold(s[len(s)-len(suffix):], suffix) {
		return s, false
	}
	return s[:len(s)-len(suffix)], true
}

// entryOf reads a file below Entries; nil if systemd-boot passes it over.
func entryOf(name string, f File) *Entry {
	base := path.Base(name)
	_, efi := cutSuffixFold(base, ".efi")
	if !efi || strings.HasPrefix(base, ".") || hasPrefixFold(base, "auto-") || f.Garbled || f.Release == nil {
		return nil
	}
	_, left, done := Counter(base)
	e := &Entry{File: name, ID: strings.ToLower(base), Left: left, Done: done,
		SortKey: cmp.Or(f.Release.ImageID, f.Release.ID),
		Version: cmp.Or(f.Release.ImageVersion, f.Release.VersionID, f.Release.BuildID)}
	if f.Release.PrettyName == "" || e.SortKey == "" && e.Version == "" {
		// systemd-boot needs a title, and something to sort by.
		return nil
	}
	return e
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// Compare orders entries as systemd-boot does; the first one is started when
// nothing else is asked for: those with tries left, then by sort key, then
// the newest version, then the greatest ID.
func (e Entry) Compare(o Entry) int {
	spent := func(x Entry) int {
		if x.Left == 0 {
			return 1
		}
		return 0
	}
	keyless := func(x Entry) int {
		if x.SortKey == "" {
			return 1
		}
		return 0
	}
	if c := cmp.Or(spent(e)-spent(o), keyless(e)-keyless(o)); c != 0 {
		return c
	}
	if e.SortKey != "" {
		if c := cmp.Or(strings.Compare(e.SortKey, o.SortKey), CompareVersions(o.Version, e.Version)); c != 0 {
			return c
		}
	}
	if c := CompareVersions(o.ID, e.ID); c != 0 {
		return c
	}
	if e.Left < 0 || o.Left < 0 {
		return 0
	}
	return cmp.Or(cmp.Compare(o.Left, e.Left), cmp.Compare(e.Done, o.Done))
}

// CompareVersions compares two versions (UAPI version format specification):
// runs of digits by their number, runs of letters by their bytes, "~" before
// everything, the end before anything else, then "-", "^" and ".".
func CompareVersions(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, ignored), strings.TrimLeftFunc(b, ignored)
		for _, r := range "~" {
			if x, y := startsWith(a, r), startsWith(b, r); x || y {
				if c := boolCompare(y, x); c != 0 {
					return c
				}
				a, b = a[1:], b[1:]
				goto next
			}
		}
		if a == "" || b == "" {
			return cmp.Compare(min(len(a), 1), min(len(b), 1))
		}
		for _, r := range "-^." {
			if x, y := startsWith(a, r), startsWith(b, r); x || y {
				if c := boolCompare(x, y); c != 0 {
					return -c
				}
				a, b = a[1:], b[1:]
				goto next
			}
		}
		if isDigit(rune(a[0])) || isDigit(rune(b[0])) {
			var x, y string
			x, a = run(a, isDigit)
			y, b = run(b, isDigit)
			if c := cmp.Compare(min(len(x), 1), min(len(y), 1)); c != 0 {
				return c
			}
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y)); c != 0 {
				return c
			}
			continue
		}
		{
			var x, y string
			x, a = run(a, isLetter)
			y, b = run(b, isLetter)
			if c := strings.Compare(x, y); c != 0 {
				return c
			}
		}
	next:
	}
}

func ignored(r rune) bool {
	return !isDigit(r) && !isLetter(r) && !strings.ContainsRune("~-^.", r)
}

func isDigit(r rune) bool  { return r >= '0' && r <= '9' }
func isLetter(r rune) bool { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }

func startsWith(s string, r rune) bool { return s != "" && rune(s[0]) == r }

func boolCompare(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

func run(s string, is func(rune) bool) (head, rest string) {
	i := 0
	for i < len(s) && is(rune(s[i])) {
		i++
	}
	return s[:i], s[i:]
}
