package scenario

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// hostileFirmware is what a machine's firmware tells when it wants to harm
// whoever looks at the queue: markup, terminal escapes (C0 and C1), text that
// runs backwards, a spreadsheet formula, templates, and far too much of it.
func hostileFirmware() machine.SMBIOS {
	return machine.SMBIOS{
		Manufacturer:      "<script>alert('canary')</script>\r\n<b>second line</b>",
		Product:           "\x1b[38;5;199mpink\x1b[0m \x1b]0;canary-title\x07PC\u009b5m",
		Version:           strings.Repeat("\x1b[2J", 75),
		Serial:            `=HYPERLINK("http://canary","x")`,
		SKU:               "\u2066{{template}}\u2069",
		Family:            "\ufeff\u200b@SUM(1)",
		BoardManufacturer: "\u202eevil\u202c \u2066board\u2069\u200b",
		BoardProduct:      "{{.Canary}}${canary}`id`%n",
		BoardVersion:      "'; DROP TABLE requests; --",
		BoardSerial:       strings.Repeat("0123456789", 30),
		BoardAsset:        "\xff\xfe\xfa",
	}
}

// hostileCleaned is what may be left of it, spelled out by hand: a check that
// called the cleaner would repeat its mistakes. The recovery image puts a
// question mark for each character that is none, so that people see that
// something was there; it reads one line.
var hostileCleaned = fleet.Hardware{
	Vendor:      "<script>alert('canary')</script>?",
	Product:     "?[38;5;199mpink?[0m ?]0;canary-title?PC?5m",
	Serial:      `=HYPERLINK("http://canary","x")`,
	BoardVendor: "?evil? ?board??",
	Board:       "{{.Canary}}${canary}`id`%n",
	BoardSerial: "01234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567",
}

// injected are pieces of hostileFirmware that no console and no command may
// show. They are such that nobody honest prints them.
var injected = []string{"\x1b[38;5;199m", "\x1b]0;", "\u009b", "\u202e", "\u2066", "\u200b", "\ufeff", "\xff\xfe\xfa"}

// checkHostile: what hostile firmware told arrived, cleaned, and nothing that
// shows it does what it wanted.
func checkHostile(ctx context.Context, l *lab.Lab, c *centre, machines []*machine.Machine) error {
	list, err := c.requests(ctx)
	if err != nil {
		return err
	}
	err = nil
	if len(list) == 0 {
		err = errors.New("no request came: nothing was tried")
	}
	for _, r := range list {
		if perr := sameStrings(r.Evidence.Hardware, hostileCleaned); perr != nil {
			err = errors.Join(err, fmt.Errorf("request %s: %w", r.ID, perr))
		}
	}
	if err := l.Check("hostile firmware: its words arrive, and harmless", err); err != nil {
		return err
	}

	export := l.Path("audit.jsonl")
	commands := [][]string{
		{"get", "requests"}, {"get", "requests", "-o", "wide"}, {"get", "requests", "-o", "json"}, {"get", "requests", "-o", "yaml"},
		{"get", "nodes", "-o", "wide"}, {"get", "nodes", "-o", "json"},
		{"events", "--tail", "1000"}, {"events", "--tail", "1000", "-o", "wide"}, {"events", "--tail", "1000", "-o", "json"},
		{"audit", "list", "-o", "wide"}, {"audit", "export"},
	}
	for _, r := range list {
		commands = append(commands, []string{"describe", string(r.ID)}, []string{"describe", string(r.ID), "-o", "json"})
	}
	var errs []error
	for _, args := range commands {
		out, err := c.muster(ctx, args...)
		if err == nil {
			err = harmless(out)
		}
		if err == nil && (args[len(args)-1] == "json" || args[0] == "audit" && args[1] == "export") {
			err = harmlessJSON(out)
		}
		switch {
		case err != nil:
		case args[0] == "describe" && !bytes.Contains(out, []byte("199mpink")):
			err = errors.New("the machine's words are not there: nothing was tried")
		case args[0] == "get" && args[1] == "requests" && len(args) == 2:
			// A banner, a heading, a line for each.
			if n := bytes.Count(out, []byte("\n")); n != 2+len(list) {
				err = fmt.Errorf("%d lines for %d requests", n, len(list))
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("muster %s: %w", strings.Join(args, " "), err))
		}
	}
	if err := l.Check("hostile firmware: no command's output holds its control characters or new lines", errors.Join(errs...)); err != nil {
		return err
	}

	errs = nil
	for _, m := range machines {
		b, err := os.ReadFile(l.Path(m.Name(), "serial.log"))
		if err == nil && len(b) == 0 {
			err = errors.New("its console is empty: nothing was tried")
		}
		for _, s := range injected {
			if err == nil && bytes.Contains(b, []byte(s)) {
				err = fmt.Errorf("its console shows %q", s)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.Name(), err))
		}
	}
	if err := l.Check("hostile firmware: the machine's own console is not taken in either", errors.Join(errs...)); err != nil {
		return err
	}

	_, err = c.muster(ctx, "audit", "export", "--out", export)
	if err == nil {
		_, err = c.muster(ctx, "audit", "verify", "--file", export)
	}
	return l.Check("hostile firmware: the exported audit log's chain is whole", err)
}

func sameStrings(got, want fleet.Hardware) error {
	var errs []error
	for _, f := range []struct{ name, got, want string }{
		{"vendor", got.Vendor, want.Vendor}, {"product", got.Product, want.Product}, {"serial", got.Serial, want.Serial},
		{"board vendor", got.BoardVendor, want.BoardVendor}, {"board", got.Board, want.Board}, {"board serial", got.BoardSerial, want.BoardSerial},
	} {
		if f.got != f.want {
			errs = append(errs, fmt.Errorf("%s is %q, want %q", f.name, f.got, f.want))
		}
	}
	return errors.Join(errs...)
}

// harmless returns nil if nothing in text can act on a terminal or mislead
// the eye, and no line begins where firmware wanted one to.
func harmless(text []byte) error {
	if !utf8.Valid(text) {
		return errors.New("it is not UTF-8")
	}
	for i, r := range string(text) {
		if r != '\n' && acts(r) {
			return fmt.Errorf("%U at byte %d", r, i)
		}
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(strings.TrimSpace(line), "<b>second") {
			return fmt.Errorf("the firmware's own line: %q", line)
		}
	}
	return nil
}

// acts reports controls (C0, DEL, C1), bidirectional and invisible
// characters.
func acts(r rune) bool {
	return r < 0x20 || r >= 0x7f && r < 0xa0 || r == 0xad || r == 0x61c || r == 0x180e ||
		r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2060 && r <= 0x206f || r == 0xfeff || r == 0xfffd
}

// harmlessJSON returns nil if no string in JSON values, decoded, holds what
// harmless forbids: escaping alone would only hand it on.
func harmlessJSON(text []byte) error {
	depth := 0
	for d := json.NewDecoder(bytes.NewReader(text)); ; {
		t, err := d.Token()
		if errors.Is(err, io.EOF) && depth == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if s, ok := t.(string); ok {
			if strings.ContainsFunc(s, acts) {
				return fmt.Errorf("the string %q", s)
			}
		}
	}
}
