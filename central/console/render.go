package console

import (
	"embed"
	"fmt"
	"html/template"
	"maps"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/text"
)

//go:embed templates
var templateFiles embed.FS

// parsePages reads every page with the frame around it.
func parsePages(a assets) (map[string]*template.Template, error) {
	base, err := template.New("").Funcs(funcs).Funcs(template.FuncMap{"asset": a.ref}).ParseFS(templateFiles, "templates/parts/*.html")
	if err != nil {
		return nil, fmt.Errorf("console: read templates: %w", err)
	}
	names, err := templateFiles.ReadDir("templates")
	if err != nil {
		return nil, fmt.Errorf("console: read templates: %w", err)
	}
	pages := make(map[string]*template.Template)
	for _, e := range names {
		if e.IsDir() {
			continue
		}
		t, err := base.Clone()
		if err == nil {
			_, err = t.ParseFS(templateFiles, "templates/"+e.Name())
		}
		if err != nil {
			return nil, fmt.Errorf("console: read template %s: %w", e.Name(), err)
		}
		pages[strings.TrimSuffix(e.Name(), path.Ext(e.Name()))] = t
	}
	return pages, nil
}

// maxShown bounds one string of a machine on a page. Stored strings are
// shorter; this holds when a bug above lets longer ones through.
const maxShown = 512

var funcs = template.FuncMap{
	"say":     say,
	"ago":     ago,
	"ends":    ends,
	"stamp":   stamp,
	"machine": machineTime,
	"labels":  labelsOf,
	"words":   func(s string) []string { return strings.Fields(say(s)) },
	"spoken":  func(id fleet.NodeID) string { return fleet.Words(id) },
	"short":   short,
	"bytes":   sizeOf,
	"join":    func(s []string) string { return say(strings.Join(s, ", ")) },
	"path":    url.PathEscape,
	"plural":  plural,
	"upper":   upper,
	"dict":    dict,
	"add":     func(a, b int) int { return a + b },
}

// say is any string on its way to a page: html/template escapes markup, this
// takes out what people cannot see or what turns text around.
func say(v any) string { return text.Clean(fmt.Sprint(v), maxShown) }

func upper(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	if n == 0 {
		return ""
	}
	return string(unicode.ToUpper(r)) + s[n:]
}

// ago is a time span in its largest unit, two for days.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	d := now.Sub(t)
	switch {
	case d < 0:
		return "just now"
	case d < time.Minute:
		return fmt.Sprintf("%d s ago", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", d/time.Hour)
	}
	return fmt.Sprintf("%d days ago", d/(24*time.Hour))
}

// ends is when something that ends will, in the unit that people plan in.
func ends(now, t time.Time) string {
	d := t.Sub(now)
	switch {
	case d <= 0:
		return "now"
	case d < time.Hour:
		return fmt.Sprintf("in %d min", (d+time.Minute-1)/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("in %d h", d/time.Hour)
	}
	return fmt.Sprintf("in %d days", d/(24*time.Hour))
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

func machineTime(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func labelsOf(m map[string]string) (out []string) {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, say(k+"="+m[k]))
	}
	return out
}

func short(v any) string {
	s := say(v)
	if len(s) > 16 {
		return s[:16] + "…"
	}
	return s
}

func sizeOf(n int64) string {
	switch {
	case n <= 0:
		return "unknown"
	case n >= 1e12:
		return fmt.Sprintf("%.1f TB", float64(n)/1e12)
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func plural(n any, one, many string) string {
	if s := fmt.Sprint(n); s == "1" {
		return "1 " + one
	}
	return fmt.Sprintf("%v %s", n, many)
}

// dict gives a part of a page more than one value.
func dict(pairs ...any) (map[string]any, error) {
	if len(pairs)%2 != 0 {
		return nil, fmt.Errorf("console: dict wants pairs")
	}
	m := make(map[string]any)
	for i := 0; i < len(pairs); i += 2 {
		m[fmt.Sprint(pairs[i])] = pairs[i+1]
	}
	return m, nil
}

func queryEscape(s string) string { return url.QueryEscape(s) }

// command is a CLI command for people to copy: each word is one word to a
// shell, whatever a machine says it is called.
func command(words ...string) string {
	out := []string{"muster"}
	for _, w := range words {
		out = append(out, quoted(w))
	}
	return strings.Join(out, " ")
}

func quoted(w string) string {
	w = say(w)
	plain := func(r rune) bool {
		return r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("-_=./:,@%+", r))
	}
	if w != "" && strings.IndexFunc(w, func(r rune) bool { return !plain(r) }) < 0 {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
