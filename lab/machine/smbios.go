package machine

import (
	"fmt"
	"strings"
)

// SMBIOS is what the machine's firmware says of system and board (SMBIOS
// 3.6, 7.2 and 7.3). An empty field says what a lab machine says by default,
// or nothing. Values may hold any byte but NUL: real firmware does not keep to
// rules either.
type SMBIOS struct {
	// Type 1.
	Manufacturer, Product, Version, Serial, SKU, Family string
	// Type 2.
	BoardManufacturer, BoardProduct, BoardVersion, BoardSerial, BoardAsset string
}

// maxSMBIOS caps one string; longer ones are no test of ours any more.
const maxSMBIOS = 1024

type smbiosField struct{ key, value string }

func (s SMBIOS) system() []smbiosField {
	return []smbiosField{{"manufacturer", s.Manufacturer}, {"product", s.Product}, {"version", s.Version},
		{"serial", s.Serial}, {"sku", s.SKU}, {"family", s.Family}}
}

func (s SMBIOS) board() []smbiosField {
	return []smbiosField{{"manufacturer", s.BoardManufacturer}, {"product", s.BoardProduct}, {"version", s.BoardVersion},
		{"serial", s.BoardSerial}, {"asset", s.BoardAsset}}
}

func (s SMBIOS) problems() []string {
	var out []string
	for _, f := range append(s.system(), s.board()...) {
		if strings.ContainsRune(f.value, 0) || len(f.value) > maxSMBIOS {
			out = append(out, fmt.Sprintf("SMBIOS %s of %d bytes: want at most %d, none of them NUL", f.key, len(f.value), maxSMBIOS))
		}
	}
	return out
}

// smbiosArgs is QEMU's options for what the firmware says. In them a comma
// ends a value and two commas are one.
func (c Config) smbiosArgs() []string {
	s := c.SMBIOS
	for _, d := range []struct {
		field *string
		value string
	}{{&s.Manufacturer, "muster"}, {&s.Product, "lab"}, {&s.Serial, c.Serial}} {
		if *d.field == "" {
			*d.field = d.value
		}
	}
	join := func(kind string, fields []smbiosField) string {
		for _, f := range fields {
			if f.value != "" {
				kind += "," + f.key + "=" + strings.ReplaceAll(f.value, ",", ",,")
			}
		}
		return kind
	}
	system := join("type=1", s.system())
	if c.UUID != "" {
		system += ",uuid=" + c.UUID
	}
	args := []string{"-smbios", system}
	if board := join("type=2", s.board()); board != "type=2" {
		args = append(args, "-smbios", board)
	}
	return args
}
