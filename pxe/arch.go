package pxe

import "fmt"

// Arch is a client system architecture type (DHCP option 93, RFC 4578
// section 2.1, IANA "Processor Architecture Types").
type Arch uint16

// The architectures that real clients send.
const (
	ArchBIOS        Arch = 0
	ArchEFIIA32     Arch = 6
	ArchEFIX64      Arch = 7
	ArchEFIBC       Arch = 9
	ArchEFIARM32    Arch = 10
	ArchEFIARM64    Arch = 11
	ArchHTTPIA32    Arch = 15
	ArchHTTPX64     Arch = 16
	ArchHTTPBC      Arch = 17
	ArchHTTPARM32   Arch = 18
	ArchHTTPARM64   Arch = 19
	ArchHTTPBIOS    Arch = 20
	ArchEFIRISCV64  Arch = 27
	ArchHTTPRISCV64 Arch = 28
)

// Transport is how the client's firmware can fetch a file.
type Transport uint8

// The transports of firmware.
const (
	TransportNone Transport = iota
	TransportTFTP
	TransportHTTP
)

// String returns "none", "tftp" or "http".
func (t Transport) String() string {
	switch t {
	case TransportTFTP:
		return "tftp"
	case TransportHTTP:
		return "http"
	}
	return "none"
}

// Platform is what an Arch means to us.
type Platform struct {
	// CPU is the Go name of the processor: amd64, arm64, 386, arm, riscv64.
	CPU string
	// Transport is the one the firmware asked with.
	Transport Transport
	// Refusal says why there is never an image for it; empty if there can be.
	Refusal string
}

const (
	noBIOS  = "legacy BIOS boot is not supported: switch the firmware to UEFI network boot"
	noIA32  = "32-bit UEFI is not supported: muster has no 32-bit x86 image"
	noARM32 = "32-bit ARM is not supported: muster has no such image"
	noRISCV = "RISC-V is not supported: muster has no such image"
)

// platforms is the arch matrix. A missing image of a supported CPU is not a
// matter of this table but of Policy.Images.
//
// 9 ("EFI BC") is what IANA's registry and several firmwares use for x64, 7
// is what EDK2 x64 sends; both get the same file.
var platforms = map[Arch]Platform{
	ArchBIOS:        {CPU: "amd64", Transport: TransportTFTP, Refusal: noBIOS},
	ArchEFIIA32:     {CPU: "386", Transport: TransportTFTP, Refusal: noIA32},
	ArchEFIX64:      {CPU: "amd64", Transport: TransportTFTP},
	ArchEFIBC:       {CPU: "amd64", Transport: TransportTFTP},
	ArchEFIARM32:    {CPU: "arm", Transport: TransportTFTP, Refusal: noARM32},
	ArchEFIARM64:    {CPU: "arm64", Transport: TransportTFTP},
	ArchHTTPIA32:    {CPU: "386", Transport: TransportHTTP, Refusal: noIA32},
	ArchHTTPX64:     {CPU: "amd64", Transport: TransportHTTP},
	ArchHTTPBC:      {CPU: "amd64", Transport: TransportHTTP},
	ArchHTTPARM32:   {CPU: "arm", Transport: TransportHTTP, Refusal: noARM32},
	ArchHTTPARM64:   {CPU: "arm64", Transport: TransportHTTP},
	ArchHTTPBIOS:    {CPU: "amd64", Transport: TransportHTTP, Refusal: noBIOS},
	ArchEFIRISCV64:  {CPU: "riscv64", Transport: TransportTFTP, Refusal: noRISCV},
	ArchHTTPRISCV64: {CPU: "riscv64", Transport: TransportHTTP, Refusal: noRISCV},
}

// Platform looks a up in the arch matrix; ok is false for an unknown type.
func (a Arch) Platform() (p Platform, ok bool) {
	p, ok = platforms[a]
	return p, ok
}

// String names the architecture with its number, as in "x64 UEFI (7)".
func (a Arch) String() string {
	p, ok := platforms[a]
	switch {
	case !ok:
		return fmt.Sprintf("unknown architecture (%d)", uint16(a))
	case a == ArchBIOS:
		return "x86 BIOS (0)"
	case a == ArchHTTPBIOS:
		return "x86 BIOS HTTP (20)"
	case p.Transport == TransportHTTP:
		return fmt.Sprintf("%s UEFI HTTP (%d)", p.CPU, uint16(a))
	}
	return fmt.Sprintf("%s UEFI (%d)", p.CPU, uint16(a))
}

// Choose picks the value of a list of several that we know; firmware lists
// its best first (RFC 4578 section 2.1 allows several). With none known it
// returns the first one and false, and with an empty list 0 and false.
func Choose(list []Arch) (Arch, bool) {
	for _, a := range list {
		if _, ok := platforms[a]; ok {
			return a, true
		}
	}
	if len(list) > 0 {
		return list[0], false
	}
	return 0, false
}
