package bootmodel

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/firmware"
)

func TestCounter(t *testing.T) {
	for _, c := range []struct {
		name, base string
		left, done int
	}{
		{"edge-1.efi", "edge-1.efi", -1, 0},
		{"edge-1+3.efi", "edge-1.efi", 3, 0},
		{"edge-1+0-3.efi", "edge-1.efi", 0, 3},
		{"EDGE+2-1.EFI", "EDGE.EFI", 2, 1},
		{"edge+3.conf", "edge+3.conf", -1, 0},
		{"edge+.efi", "edge+.efi", -1, 0},
		{"edge+3-.efi", "edge+3-.efi", -1, 0},
		{"edge+3-x.efi", "edge+3-x.efi", -1, 0},
		{"edge+1+2.efi", "edge+1.efi", 2, 0},
		{"edge+9999999999.efi", "edge+9999999999.efi", -1, 0},
		{"+1.efi", ".efi", 1, 0},
	} {
		base, left, done := Counter(c.name)
		if base != c.base || left != c.left || done != c.done {
			t.Errorf("Counter(%q) = %q, %d, %d; want %q, %d, %d", c.name, base, left, done, c.base, c.left, c.done)
		}
		if left >= 0 && !strings.EqualFold(firmware.CountedName(base, left, done), c.name) {
			t.Errorf("firmware.CountedName(%q, %d, %d) = %q; want %q", base, left, done, firmware.CountedName(base, left, done), c.name)
		}
	}
}

// The examples of the UAPI version format specification, and ours.
func TestCompareVersions(t *testing.T) {
	sorted := []string{"~", "~1", "", "1~rc1", "1", "1-2", "1.2~beta", "1.2", "1.2.1", "1.2a", "1.9", "1.10", "2", "11", "122", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"}
	for i, a := range sorted {
		for j, b := range sorted {
			got := CompareVersions(a, b)
			if want := boolCompare(i > j, i < j); sign3(got) != sign3(want) {
				t.Errorf("CompareVersions(%q, %q) = %d; want %d", a, b, got, want)
			}
		}
	}
}

func sign3(n int) int { return boolCompare(n > 0, n < 0) }

// What starts is always a file that can start; counters never grow; a machine
// that resets for ever ends in something that is not counted.
func TestPowerOnProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := Machine{Order: installed, ESP: esp(nil)}
		for range rapid.IntRange(0, 4).Draw(t, "files") {
			name := rapid.SampledFrom([]string{"edge-1", "edge-2", "edge-3"}).Draw(t, "name")
			f := uki("edge", name[5:])
			f.Starts = rapid.Bool().Draw(t, "starts")
			f.Garbled = !f.Starts && rapid.Bool().Draw(t, "garbled")
			base := name + ".efi"
			if rapid.Bool().Draw(t, "counted") {
				base = firmware.CountedName(base, rapid.IntRange(0, 3).Draw(t, "left"), rapid.IntRange(0, 3).Draw(t, "done"))
			}
			m.ESP[Entries+"/"+base] = f
		}
		m.ReadOnly = rapid.Bool().Draw(t, "read-only")
		left := func() (n int) {
			for name := range m.ESP {
				if _, l, _ := Counter(name[strings.LastIndexByte(name, '/')+1:]); l > 0 {
					n += l
				}
			}
			return n
		}
		files := len(m.ESP)
		var last string
		for range 30 {
			before := left()
			out := m.PowerOn(false)
			if out.Network || out.Menu {
				t.Fatalf("with a sound recovery image: %v", out.Steps)
			}
			if !m.ESP[out.File].Starts {
				t.Fatalf("started %s, which cannot start: %v", out.File, out.Steps)
			}
			if left() > before {
				t.Fatalf("tries grew from %d to %d: %v", before, left(), out.Steps)
			}
			if len(m.ESP) > files {
				t.Fatalf("files grew: %v", slices.Sorted(maps.Keys(m.ESP)))
			}
			last = out.File
		}
		if _, l, _ := Counter(last[strings.LastIndexByte(last, '/')+1:]); l > 0 && !m.ReadOnly {
			t.Fatalf("after 30 starts still trying %s", last)
		}
	})
}

func FuzzCounter(f *testing.F) {
	f.Add("edge-1+3-2.efi")
	f.Add("+.efi")
	f.Fuzz(func(t *testing.T, name string) {
		base, left, done := Counter(name)
		if left < 0 && base != name {
			t.Fatalf("%q without counter became %q", name, base)
		}
		if left >= 0 && (done < 0 || len(base) >= len(name)) {
			t.Fatalf("%q: %q %d %d", name, base, left, done)
		}
	})
}

func FuzzCompareVersions(f *testing.F) {
	f.Add("1.2~rc1", "1.2")
	f.Fuzz(func(t *testing.T, a, b string) {
		if CompareVersions(a, b) != -CompareVersions(b, a) {
			t.Fatalf("%q, %q: not antisymmetric", a, b)
		}
		if CompareVersions(a, a) != 0 {
			t.Fatalf("%q is not itself", a)
		}
	})
}
