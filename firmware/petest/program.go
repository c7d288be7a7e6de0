package petest

import (
	"encoding/binary"
	"unicode/utf16"
)

// Then is what a Program does at its end.
type Then uint8

const (
	// Reset starts the machine anew, through the firmware's variables as they
	// are (register 0xcf9 of Intel chipsets).
	Reset Then = iota
	// Halt stays for ever: what a program does that runs.
	Halt
	// Return goes back to the caller with EFI_LOAD_ERROR.
	Return
)

// Program is a UEFI application for tests of boot order: it needs no kernel
// and is done in a moment, so that a dozen boots fit into the time of one real
// one. It writes firmware variables, says a line on the first serial port and
// ends in the way told.
type Program struct {
	// Say is the line, without its end.
	Say string
	// OSRelease is the .osrel section that makes it an entry for systemd-boot;
	// "" leaves it out.
	OSRelease string
	Variables []Variable
	Then      Then
	// Pad makes the file larger by so many bytes.
	Pad int
}

// Variable is a firmware variable that a Program writes (UEFI 2.10, 8.2).
type Variable struct {
	Name string
	// GUID is in the mixed byte order of UEFI.
	GUID [16]byte
	Data []byte
}

// The vendors of the variables that matter for booting.
var (
	// GlobalVariable is EFI_GLOBAL_VARIABLE: BootOrder, Boot####.
	GlobalVariable = [16]byte{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	// LoaderVariable is systemd's: 4a67b082-0a4c-41cf-b6c7-440b29bb8c4f.
	LoaderVariable = [16]byte{0x82, 0xb0, 0x67, 0x4a, 0x4c, 0x0a, 0xcf, 0x41, 0xb6, 0xc7, 0x44, 0x0b, 0x29, 0xbb, 0x8c, 0x4f}
)

// UTF16 is s as firmware writes text, with its zero.
func UTF16(s string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// Make returns the program as a PE32+ file.
func (p Program) Make() []byte {
	code := p.code()
	sections := []Section{{Name: ".text", Data: code}}
	if p.OSRelease != "" {
		sections = append(sections, Section{Name: ".osrel", Data: []byte(p.OSRelease)})
	}
	if p.Pad > 0 {
		sections = append(sections, Section{Name: ".pad", Data: make([]byte, p.Pad)})
	}
	// Sections are aligned to pages, since firmware insists; the flags are
	// those of code whose texts lie in it.
	return assemble(layout{characteristics: 0x22, align: 0x1000, first: 0x1000, text: 0xe0000020, code: len(code)}, sections)
}

// code is the machine code (x86-64; UEFI 2.10, 2.3.4: arguments in rcx, rdx,
// r8, r9 and on the stack) with its texts behind it.
func (p Program) code() []byte {
	var code, data []byte
	type fix struct{ at, to int } // code[at:] is a 32-bit offset to data[to]
	var fixes []fix
	emit := func(b ...byte) { code = append(code, b...) }
	imm32 := func(v uint32) { code = binary.LittleEndian.AppendUint32(code, v) }
	put := func(b []byte) int {
		for len(data)%8 != 0 {
			data = append(data, 0)
		}
		data = append(data, b...)
		return len(data) - len(b)
	}
	lea := func(to int, op ...byte) {
		emit(op...)
		fixes = append(fixes, fix{len(code), to})
		imm32(0)
	}

	emit(0x53, 0x56)             // push rbx; push rsi
	emit(0x48, 0x83, 0xec, 0x38) // sub rsp, 0x38: shadow space, 16-byte aligned
	emit(0x48, 0x8b, 0x5a, 88)   // mov rbx, [rdx+88]: SystemTable->RuntimeServices
	for _, v := range p.Variables {
		lea(put(UTF16(v.Name)), 0x48, 0x8d, 0x0d) // lea rcx, name
		lea(put(v.GUID[:]), 0x48, 0x8d, 0x15)     // lea rdx, vendor
		emit(0x41, 0xb8)                          // mov r8d, attributes
		imm32(7)                                  // non-volatile, boot and runtime access
		emit(0x41, 0xb9)                          // mov r9d, size
		imm32(uint32(len(v.Data)))                //
		lea(put(v.Data), 0x48, 0x8d, 0x05)        // lea rax, data
		emit(0x48, 0x89, 0x44, 0x24, 0x20)        // mov [rsp+32], rax
		emit(0xff, 0x53, 88)                      // call [rbx+88]: SetVariable
	}
	lea(put([]byte("\r\n"+p.Say+"\r\n\x00")), 0x48, 0x8d, 0x35) // lea rsi, text
	next := len(code)
	emit(0x66, 0xba, 0xfd, 0x03) // mov dx, 0x3fd: line status
	emit(0xec, 0xa8, 0x20)       // in al, dx; test al, 0x20: may send
	emit(0x74, 0xfb)             // jz back to in
	emit(0xac, 0x84, 0xc0)       // lodsb; test al, al
	emit(0x74, 0x07)             // jz end
	emit(0x66, 0xba, 0xf8, 0x03) // mov dx, 0x3f8
	emit(0xee)                   // out dx, al
	emit(0xeb, byte(next-len(code)-2))
	switch p.Then {
	case Reset:
		emit(0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x02, 0xee, 0xb0, 0x06, 0xee) // mov dx, 0xcf9; 2, then 6
		emit(0xeb, 0xfe)
	case Halt:
		emit(0xf3, 0x90, 0xeb, 0xfc) // pause; jmp: interrupts stay on
	case Return:
		emit(0x48, 0xb8, 1, 0, 0, 0, 0, 0, 0, 0x80) // mov rax, EFI_LOAD_ERROR
		emit(0x48, 0x83, 0xc4, 0x38, 0x5e, 0x5b, 0xc3)
	}
	for len(code)%8 != 0 {
		emit(0xcc)
	}
	for _, f := range fixes {
		binary.LittleEndian.PutUint32(code[f.at:], uint32(len(code)+f.to-(f.at+4)))
	}
	return append(code, data...)
}
