package firmware

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func testESP(id byte) PartRef {
	return PartRef{Number: 1, Start: 2048, Sectors: 1 << 21, ID: GUID{id, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}}
}

func TestGUIDText(t *testing.T) {
	const text = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	g, err := ParseGUID(text)
	if err != nil || g.String() != text || g[0] != 0x28 || g[15] != 0x3b {
		t.Fatalf("%v %v", g, err)
	}
	if up, err := ParseGUID(strings.ToUpper(text)); err != nil || up != g {
		t.Fatalf("%v %v", up, err)
	}
	for _, bad := range []string{"", "c12a7328", text + "0", strings.ReplaceAll(text, "-", "a"), "c12a7328-f81f-11d2-ba4b-00a0c93ec93x"} {
		if _, err := ParseGUID(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestBootEntryRoundTrip(t *testing.T) {
	for _, e := range BootEntries(testESP(1), RecoveryEntry("1.2")) {
		e.Number = 7
		b, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseBootEntry(7, b)
		if err != nil || got != e {
			t.Errorf("got %+v, %v; want %+v", got, err, e)
		}
		for n := range b {
			_, _ = ParseBootEntry(7, b[:n])
		}
	}
	if _, err := (BootEntry{Network: true}).Encode(); err == nil {
		t.Error("a network entry was written")
	}
}

func TestPlanBootOrder(t *testing.T) {
	want := BootEntries(testESP(1), RecoveryEntry("1"))
	old := BootEntries(testESP(9), RecoveryEntry("1"))
	pxe := BootEntry{Number: 4, Active: true, Title: "UEFI PXEv4", Network: true}
	usb := BootEntry{Number: 5, Active: true, Title: "USB"}
	p, err := PlanBootOrder([]BootEntry{pxe, usb}, []uint16{0}, []uint16{5, 4}, want)
	if err != nil || !slices.Equal(p.Order, []uint16{1, 2, 3, 4, 5}) || len(p.Write) != 3 || len(p.Remove) != 0 {
		t.Fatalf("%+v %v", p, err)
	}
	// Done once, nothing is left to do.
	have := append(slices.Clone(p.Write), pxe, usb)
	if p, err := PlanBootOrder(have, []uint16{0}, p.Order, want); err != nil || !p.Empty() {
		t.Fatalf("again: %+v %v", p, err)
	}
	// Entries of a disk that was taken out are written over, surplus ones go.
	for i := range old {
		old[i].Number = uint16(i)
	}
	have = append(slices.Clone(old), BootEntry{Number: 8, Title: TitleCopy, Part: testESP(7), File: LoaderCopy}, pxe)
	p, err = PlanBootOrder(have, nil, []uint16{4, 8, 0, 1, 2}, want)
	if err != nil || !slices.Equal(p.Order, []uint16{0, 1, 2, 4}) || len(p.Write) != 3 || !slices.Equal(p.Remove, []uint16{8}) {
		t.Fatalf("other disk: %+v %v", p, err)
	}
	if p.Write[0].Number != 0 || p.Write[0].Part != testESP(1) {
		t.Fatalf("other disk: %+v", p.Write[0])
	}
	full := make([]uint16, 1<<16)
	for i := range full {
		full[i] = uint16(i)
	}
	if _, err := PlanBootOrder(nil, full, nil, want); err == nil {
		t.Error("numbers out of nothing")
	}
}

// Whatever is there: what we want comes first and in order, nothing foreign is
// lost or changed, and a second plan is empty. After each single step the
// order names only entries that are there, or were dangling before.
func TestPlanBootOrderProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := BootEntries(testESP(1), RecoveryEntry("1"))
		var have []BootEntry
		seen := map[uint16]bool{}
		for range rapid.IntRange(0, 12).Draw(t, "n") {
			e := BootEntry{Number: uint16(rapid.IntRange(0, 15).Draw(t, "number")), Active: rapid.Bool().Draw(t, "active"),
				Title: rapid.SampledFrom([]string{"x", TitleLoader, TitleCopy, TitleRecovery, "PXE"}).Draw(t, "title"), Part: testESP(byte(rapid.IntRange(1, 2).Draw(t, "esp"))),
				File: rapid.SampledFrom([]string{LoaderFile, LoaderCopy, ""}).Draw(t, "file")}
			e.Network = e.Title == "PXE"
			if !seen[e.Number] {
				seen[e.Number] = true
				have = append(have, e)
			}
		}
		var order []uint16
		for range rapid.IntRange(0, 12).Draw(t, "o") {
			if n := uint16(rapid.IntRange(0, 17).Draw(t, "in order")); !slices.Contains(order, n) {
				order = append(order, n)
			}
		}
		p, err := PlanBootOrder(have, nil, order, want)
		if err != nil {
			t.Fatal(err)
		}
		now := map[uint16]BootEntry{}
		for _, e := range have {
			now[e.Number] = e
		}
		for _, e := range p.Write {
			if old, ok := now[e.Number]; ok && old.Title != e.Title {
				t.Fatalf("%+v is written over %+v", e, old)
			}
			now[e.Number] = e
		}
		for i, w := range want {
			w.Number = p.Order[i]
			if now[p.Order[i]] != w {
				t.Fatalf("place %d: %+v, want %+v", i, now[p.Order[i]], w)
			}
		}
		for _, n := range p.Remove {
			if slices.Contains(p.Order, n) {
				t.Fatalf("%d is removed and in the order", n)
			}
			delete(now, n)
		}
		for _, e := range have {
			if e.Title == "x" || e.Title == "PXE" {
				if now[e.Number] != e {
					t.Fatalf("foreign %+v became %+v", e, now[e.Number])
				}
				if slices.Contains(order, e.Number) && !slices.Contains(p.Order, e.Number) {
					t.Fatalf("foreign %+v fell out of the order", e)
				}
			}
		}
		var after []BootEntry
		for _, e := range now {
			after = append(after, e)
		}
		if again, err := PlanBootOrder(after, nil, p.Order, want); err != nil || !again.Empty() {
			t.Fatalf("again: %+v %v", again, err)
		}
	})
}

func FuzzParseBootEntry(f *testing.F) {
	for _, e := range BootEntries(testESP(1), RecoveryEntry("1")) {
		b, err := e.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{1, 0, 0, 0, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseBootEntry(1, b)
		if err != nil {
			return
		}
		if len(e.Title) > maxBootText || len(e.File) > maxBootText {
			t.Fatal("too long")
		}
		_ = ParseBootOrder(b)
		_ = ParseLoaderText(b)
	})
}
