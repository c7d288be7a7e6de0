package image

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/saferwall/pe"
	"pgregory.net/rapid"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/petest"
)

func TestAssemble(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		names := []string{firmware.SectionOSRel, firmware.SectionCmdline, firmware.SectionLinux, firmware.SectionInitrd}
		var sections []section
		for _, n := range names {
			sections = append(sections, section{n, rapid.SliceOfN(rapid.Byte(), 1, 10_000).Draw(rt, n)})
		}
		out, err := assemble(fakeStub(), sections)
		if err != nil {
			rt.Fatal(err)
		}
		ours, err := firmware.ParsePE(out)
		if err != nil {
			rt.Fatal(err)
		}
		end := uint32(0)
		for _, s := range ours.Sections {
			if s.VirtualAddress < end {
				rt.Fatalf("section %s at %#x overlaps the one before it, which ends at %#x", s.Name, s.VirtualAddress, end)
			}
			end = s.VirtualAddress + s.VirtualSize
		}
		for _, s := range sections {
			data, err := ours.Section(s.name)
			if err != nil || !bytes.Equal(data, s.data) {
				rt.Fatalf("section %s does not come back (%v)", s.name, err)
			}
		}
		// Another reader of PE files agrees on the digest and the headers.
		digest, err := ours.Authenticode()
		if err != nil {
			rt.Fatal(err)
		}
		theirs, err := pe.NewBytes(out, &pe.Options{})
		if err != nil {
			rt.Fatal(err)
		}
		if err := theirs.Parse(); err != nil {
			rt.Fatal(err)
		}
		if got := theirs.Authentihash(); !bytes.Equal(got, digest[:]) {
			rt.Fatalf("digest %s, another implementation says %x", digest, got)
		}
		opt := theirs.NtHeader.OptionalHeader.(pe.ImageOptionalHeader64)
		if theirs.Checksum() != opt.CheckSum {
			rt.Fatalf("checksum %#x, another implementation says %#x", opt.CheckSum, theirs.Checksum())
		}
		if opt.SizeOfImage < end || opt.SizeOfImage%opt.SectionAlignment != 0 || opt.SizeOfImage-end >= opt.SectionAlignment {
			rt.Fatalf("SizeOfImage %#x does not fit the end %#x", opt.SizeOfImage, end)
		}
	})
}

func TestAssembleRefuses(t *testing.T) {
	one := []section{{".linux", []byte("k")}}
	var many []section
	for i := range 18 {
		many = append(many, section{"." + string(rune('a'+i)), []byte("x")})
	}
	put32 := func(at int, v uint32) []byte {
		b := fakeStub()
		binary.LittleEndian.PutUint32(b[at:], v)
		return b
	}
	for when, c := range map[string]struct {
		stub     []byte
		sections []section
		problem  string
	}{
		"the stub is no PE":                {[]byte("MZ"), one, "read stub"},
		"there is no room in the headers":  {fakeStub(), many, "section table"},
		"a section is empty":               {fakeStub(), []section{{".linux", nil}}, "empty"},
		"a section is there already":       {fakeStub(), []section{{".sdmagic", []byte("x")}}, "already"},
		"a section is given twice":         {fakeStub(), append(one, one...), "already"},
		"a name is too long":               {fakeStub(), []section{{".toolong1", []byte("x")}}, "longer"},
		"the alignment is no power of two": {put32(88+32, 513), one, "alignment"},
		"the file alignment is zero":       {put32(88+36, 0), one, "alignment"},
		"unknown bytes follow":             {append(fakeStub(), "tail"...), one, "unknown bytes"},
	} {
		_, err := assemble(c.stub, c.sections)
		if err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("when %s, then want an error about %q, got %v", when, c.problem, err)
		}
	}
}

// GNU ld leaves a symbol table after the sections.
func TestAssembleCutsSymbols(t *testing.T) {
	stub := fakeStub()
	binary.LittleEndian.PutUint32(stub[68+8:], uint32(len(stub)))
	stub = append(stub, make([]byte, 18)...)
	out, err := assemble(stub, []section{{".linux", []byte("k")}})
	if err != nil {
		t.Fatal(err)
	}
	want, err := assemble(fakeStub(), []section{{".linux", []byte("k")}})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, want) {
		t.Error("the symbol table left traces")
	}
}

func TestMeasureWantsAKernel(t *testing.T) {
	kernel := petest.Make(petest.Section{Name: ".text", Data: []byte("kernel")})
	good, err := assemble(fakeStub(), []section{{".linux", kernel}})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := Measure(good); err != nil || m.Kernel.IsZero() || m.PCR11.IsZero() || m.Kernel == m.Authenticode {
		t.Errorf("%+v, %v", m, err)
	}
	bad, err := assemble(fakeStub(), []section{{".linux", []byte("no PE")}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Measure(bad); err == nil {
		t.Error("a kernel that firmware cannot load was measured")
	}
	if _, err := Measure(fakeStub()); err == nil {
		t.Error("a stub without a kernel was measured")
	}
}
