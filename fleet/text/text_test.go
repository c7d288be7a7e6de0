package text

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

func TestClean(t *testing.T) {
	for _, row := range []struct{ name, in, want string }{
		{"plain", "Dell Inc.", "Dell Inc."},
		{"empty", "", ""},
		{"umlauts and CJK stay", "Müller 東京 Straße", "Müller 東京 Straße"},
		{"outer and inner space", "  a \t\r\n b  ", "a b"},
		{"NUL ends nothing", "a\x00b", "ab"},
		{"clear the screen", "a\x1b[2J\x1b[1;1Hb", "ab"},
		{"colour", "\x1b[31mred\x1b[0m", "red"},
		{"CSI as a C1 control", "a\u009b2Jb", "ab"},
		{"window title, BEL", "a\x1b]0;evil\x07b", "ab"},
		{"window title, ST", "a\x1b]0;evil\x1b\\b", "ab"},
		{"hyperlink", "\x1b]8;;http://evil/\x07text\x1b]8;;\x07", "text"},
		{"device control string", "a\x1bP1;2qdata\x1b\\b", "ab"},
		{"lone ESC at the end", "a\x1b", "a"},
		{"ESC in front of ESC", "a\x1b\x1b[2Jb", "ab"},
		{"string without an end", "a\x1b]0;evil", "a0;evil"},
		{"right-to-left override", "ab\u202excod.exe", "abxcod.exe"},
		{"isolates and marks", "\u2066a\u2069\u200e\u200f\u061cb", "ab"},
		{"zero width", "a\u200bb\u200cc\u200dd\ufeffe\u2060f", "abcdef"},
		{"soft hyphen", "a\u00adb", "ab"},
		{"tag characters", "a\U000e0041\U000e007fb", "ab"},
		{"variation selectors", "a\ufe0fb\U000e0100", "ab"},
		{"Hangul and Braille blanks", "a\u3164\u2800\u115fb", "ab"},
		{"no-break space", "a\u00a0b", "a b"},
		{"line separators", "a\u2028b\u2029c", "a b c"},
		{"piled-up marks", "a\u0300\u0301\u0302\u0489b", "ab"},
		{"private use", "a\ue000\U000f0000b", "ab"},
		{"no UTF-8", "a\xff\xfe\xc0\xafb", "ab"},
		{"surrogate halves as bytes", "a\xed\xa0\x80b", "ab"},
		{"markup is text", "<script>alert(1)</script>", "<script>alert(1)</script>"},
		{"template is text", "{{.Secret}} ${x}", "{{.Secret}} ${x}"},
	} {
		if got := Clean(row.in, 128); got != row.want {
			t.Errorf("%s: Clean(%q) is %q, want %q", row.name, row.in, got, row.want)
		}
	}
}

func TestCleanCutsBetweenCharacters(t *testing.T) {
	for max, want := range map[int]string{-1: "", 0: "", 1: "a", 2: "a", 3: "aß", 4: "aß", 5: "aß x", 1 << 62: "aß x"} {
		if got := Clean("aß x", max); got != want {
			t.Errorf("at most %d bytes: %q, want %q", max, got, want)
		}
	}
	if got := Clean(strings.Repeat("\u200b", 10<<20)+"a", 8); got != "" {
		t.Errorf("ten MiB of nothing give %q", got)
	}
}

func checkClean(t interface{ Fatalf(string, ...any) }, s string, max int) {
	c := Clean(s, max)
	if len(c) > max || !utf8.ValidString(c) || strings.TrimSpace(c) != c {
		t.Fatalf("Clean(%q, %d) is %q", s, max, c)
	}
	for _, r := range c {
		if r != ' ' && (!unicode.IsGraphic(r) || unicode.IsSpace(r) || unicode.Is(unicode.Bidi_Control, r)) {
			t.Fatalf("Clean(%q, %d) holds %U", s, max, r)
		}
	}
	if again := Clean(c, max); again != c {
		t.Fatalf("Clean(%q) is %q, and cleaned again %q", s, c, again)
	}
	if f := ForTerminal(s); strings.ContainsAny(f, "\x1b\r\n\x07\x00") || s != "" && f == "" {
		t.Fatalf("ForTerminal(%q) is %q", s, f)
	}
	if l := ForLabel(s); fleet.ValidateLabels(map[string]string{"k": l}) != nil {
		t.Fatalf("ForLabel(%q) is %q, which is no label value", s, l)
	}
	if f := ForCSV(s); f != "" && strings.ContainsRune("=+-@\t\r", rune(f[0])) {
		t.Fatalf("ForCSV(%q) is %q, a formula", s, f)
	}
	if !LooksLike(s, s) || !LooksLike(s, strings.ToUpper(Clean(s, 4096))) && isASCII(s) {
		t.Fatalf("%q does not look like itself", s)
	}
}

func isASCII(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r > 126 || r < 32 }) < 0
}

func TestCleanProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOf(rapid.OneOf(
			rapid.String(),
			rapid.SampledFrom([]string{"\x1b[", "\x1b]", "\x1b", "\u009b", "\x07", "\u202e", "\u200b", " ", "\xff", "\n", "=", "a", "ß"}),
		)).Draw(t, "parts")
		checkClean(t, strings.Join(parts, ""), rapid.IntRange(0, 200).Draw(t, "max"))
	})
}

func FuzzClean(f *testing.F) {
	for _, s := range []string{"", "a", "\x1b[2J", "\x1b]0;x\x07", "\u202e", "=cmd()", "\xff\xfe", "a\u0301"} {
		f.Add(s, 20)
	}
	f.Fuzz(func(t *testing.T, s string, max int) {
		if max < 0 || max > 1<<16 {
			return
		}
		checkClean(t, s, max)
	})
}

func TestForCSV(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", "": "", "=cmd()|'/c calc'!A0": "'=cmd()|'/c calc'!A0", "+1": "'+1", "-1": "'-1", "@x": "'@x",
		"\t=1": "'=1", "\x1b[0m=1": "'=1", "\u200b=1": "'=1", "a,\"b\"\n": "a,\"b\"", "1=1": "1=1",
	} {
		got := ForCSV(in)
		if got != want {
			t.Errorf("ForCSV(%q) is %q, want %q", in, got, want)
		}
		var b bytes.Buffer
		w := csv.NewWriter(&b)
		if err := w.Write([]string{got, "next"}); err != nil {
			t.Fatal(err)
		}
		w.Flush()
		if rec, err := csv.NewReader(&b).Read(); err != nil || len(rec) != 2 || rec[0] != got {
			t.Errorf("%q comes back as %q, %v", got, rec, err)
		}
	}
}

func TestForLabel(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "Dell Inc.": "Dell-Inc", "a/b": "a-b", "---": "", "ünï": "n", "..a..": "a", "a   b": "a-b",
		strings.Repeat("x", 100): strings.Repeat("x", 63), strings.Repeat("x", 62) + "  y": strings.Repeat("x", 62),
	} {
		if got := ForLabel(in); got != want {
			t.Errorf("ForLabel(%q) is %q, want %q", in, got, want)
		}
	}
}

func TestLooksLike(t *testing.T) {
	for _, row := range []struct {
		a, b string
		want bool
	}{
		{"SN1234", "sn1234", true},
		{"SNO123", "SN0123", true},
		{"SNI123", "SNl123", true},
		{"SN1234", "ЅN1234", true}, // Cyrillic DZE
		{"ABC", "АВС", true},       // Cyrillic
		{"ABC", "ΑΒC", true},       // Greek
		{"HIK", "ΗΙΚ", true},       // Greek
		{"modern", "modem", true},
		{"AB 12", "AB-12", true},
		{"AB12", "ＡＢ１２", true}, // full width
		{"AB12", "AB\u200b12", true},
		{"ABC", "ABD", false},
		{"SN1234", "SN1243", false},
		{"SN1234", "SN12345", false},
		{"SN4711", "SN4777", false},
	} {
		if got := LooksLike(row.a, row.b); got != row.want {
			t.Errorf("LooksLike(%q, %q) is %v (%q, %q)", row.a, row.b, got, Skeleton(row.a), Skeleton(row.b))
		}
	}
}

// hostile returns a Hardware with every string hostile and every list long.
func hostile() fleet.Hardware {
	const evil = "\x1b[2J<b>\u202eevil"
	fill := func(v any) {
		x := reflect.ValueOf(v).Elem()
		for i := range x.NumField() {
			switch f := x.Field(i); f.Kind() {
			case reflect.String:
				f.SetString(evil + strings.Repeat("x", 500))
			case reflect.Int, reflect.Int64:
				f.SetInt(-5)
			}
		}
	}
	var h fleet.Hardware
	fill(&h)
	for range 1000 {
		var n fleet.NIC
		var d fleet.Disk
		var v fleet.Device
		fill(&n)
		fill(&d)
		fill(&v)
		for range 100 {
			n.Addresses = append(n.Addresses, evil)
		}
		h.NICs, h.Disks, h.Devices = append(h.NICs, n), append(h.Disks, d), append(h.Devices, v)
	}
	return h
}

// Walking by reflection makes sure that a new field is not forgotten.
func TestCleanHardwareReachesEveryField(t *testing.T) {
	in := hostile()
	before, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	out := CleanHardware(in)
	if len(out.NICs) != MaxNICs || len(out.Disks) != MaxDisks || len(out.Devices) != MaxDevices || len(out.NICs[0].Addresses) != maxAddress {
		t.Errorf("lists have %d, %d, %d, %d elements", len(out.NICs), len(out.Disks), len(out.Devices), len(out.NICs[0].Addresses))
	}
	fields := 0
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				walk(path+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Slice:
			for i := range v.Len() {
				walk(path, v.Index(i))
			}
		case reflect.String:
			fields++
			if s := v.String(); s != Clean(s, MaxField) || s == "" {
				t.Errorf("%s is %q", path, s)
			}
		case reflect.Int, reflect.Int64:
			if v.Int() != 0 {
				t.Errorf("%s is %d", path, v.Int())
			}
		}
	}
	walk("hardware", reflect.ValueOf(out))
	if fields < 100 {
		t.Errorf("only %d strings were looked at", fields)
	}
	if after, err := json.Marshal(in); err != nil || !bytes.Equal(before, after) {
		t.Error("the input was changed")
	}
	if again := CleanHardware(out); !reflect.DeepEqual(again, out) {
		t.Error("cleaning twice is not cleaning once")
	}
}
