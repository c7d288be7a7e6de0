package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxOut bounds what the For functions give back, in bytes.
const maxOut = 64 << 10

// ForTerminal returns s for one line of a terminal or a log: cleaned, and
// marked with "?" if nothing visible was left of something.
func ForTerminal(s string) string {
	c := Clean(s, maxOut)
	if c == "" && s != "" {
		return "?"
	}
	return c
}

// ForCSV returns s as the content of a CSV cell, to be quoted by
// encoding/csv. A cell that a spreadsheet would take for a formula gets an
// apostrophe in front (OWASP, CSV Injection).
func ForCSV(s string) string {
	c := Clean(s, maxOut)
	if c != "" && strings.ContainsRune("=+-@|%", rune(c[0])) {
		return "'" + c
	}
	return c
}

// ForLabel returns s as the value of a label: at most 63 characters A-Z a-z
// 0-9 - _ . with a letter or digit at both ends, other characters replaced by
// '-' (runs by one). It returns "" if nothing is left.
func ForLabel(s string) string {
	var b strings.Builder
	gap := false
	for _, r := range Clean(s, maxOut) {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
			if gap && b.Len() > 0 {
				b.WriteByte('-')
			}
			gap = false
			b.WriteRune(r)
		default:
			gap = true
		}
		if b.Len() >= 63 {
			break
		}
	}
	out := b.String()
	if len(out) > 63 {
		out = out[:63]
	}
	return strings.Trim(out, "-_.")
}

// LooksLike reports whether a and b look the same to a person although they
// may differ: in case, spaces, width, accents, or by letters of other scripts
// and digits that resemble Latin letters (Cyrillic "a", "0" and "O", "rn" and
// "m"). It is for warnings ("another machine has a serial that looks like
// this one"), never for a decision: the table is short.
func LooksLike(a, b string) bool { return Skeleton(a) == Skeleton(b) }

// Skeleton returns the form of s that LooksLike compares, after the idea of
// Unicode Technical Standard 39, section 4.
func Skeleton(s string) string {
	s = Clean(s, 4096)
	var b strings.Builder
	for _, r := range s {
		if r >= 0xff01 && r <= 0xff5e { // fullwidth forms
			r -= 0xfee0
		}
		if unicode.IsSpace(r) || r == '-' || r == '_' || r == '.' || unicode.Is(unicode.Pd, r) {
			continue
		}
		r = unicode.ToLower(unicode.ToUpper(r))
		if to, ok := lookalike[r]; ok {
			r = to
		}
		b.WriteRune(r)
	}
	return pairs.Replace(b.String())
}

// pairs are two letters that look like one in most typefaces.
var pairs = strings.NewReplacer("rn", "m", "vv", "w", "cl", "d")

// lookalike maps lower-case letters and digits to one representative. Where
// the two cases of a foreign letter look like different Latin ones, upper case
// decides, since serial numbers are printed so.
var lookalike = table(
	"o", "0оοօ๐০०öóòôõøōő°ºσ",
	"l", "1iіӏι|!íìîïıłįĩīĺ",
	"a", "аαáàâäãåāăą",
	"b", "ьв68ъßβ",
	"c", "сςćčçϲ",
	"d", "ԁďđ",
	"e", "еєεéèêëēėęě3з",
	"g", "9ɡğģqԛ",
	"h", "һнηħ",
	"k", "кκķ",
	"m", "мμ",
	"n", "ñńňņνп",
	"p", "рρ",
	"r", "гŕř",
	"s", "ѕ5śšşș$",
	"t", "тτ7ťţț",
	"u", "úùûüūůűų",
	"v", "ѵ",
	"w", "ѡωŵш",
	"x", "хχ×",
	"y", "уγυýÿ",
	"z", "2ζżźž",
	"j", "ј",
)

func table(rows ...string) map[rune]rune {
	m := map[rune]rune{}
	for i := 0; i+1 < len(rows); i += 2 {
		to, _ := utf8.DecodeRuneInString(rows[i])
		for _, r := range rows[i+1] {
			m[r] = to
		}
	}
	return m
}
