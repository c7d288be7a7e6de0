package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
)

// FuzzOutput: whatever a machine says, no format lets it act on the terminal,
// and JSON stays the same JSON.
func FuzzOutput(f *testing.F) {
	for _, s := range []string{"", "plain", "\x1b[2J", "\u202egnp", "a\tb\r\nroot:", "\u0085\u009b31m", "\U000e0041\U0001f600", "\xff\x00", "=1+1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		object := []map[string]any{{"text": s, "number": int64(1) << 53}}
		tab := table{columns: []string{"TEXT", "MORE"}, rows: [][]string{{s, s}}, names: []string{s}}
		for _, name := range formats {
			var b bytes.Buffer
			if err := format(name).write(&b, object, tab); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, r := range b.String() {
				if r != '\n' && (unicode.Is(unicode.Cc, r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029') {
					t.Errorf("%s shows %U", name, r)
				}
			}
			if lines := strings.Count(b.String(), "\n"); name != "json" && name != "yaml" && lines > 2 {
				t.Errorf("%s: one row became %d lines", name, lines)
			}
		}
		var b bytes.Buffer
		if err := writeJSON(&b, s); err != nil {
			t.Fatal(err)
		}
		var back string
		if err := json.Unmarshal(b.Bytes(), &back); err != nil || back != strings.ToValidUTF8(s, "\ufffd") && strings.ToValidUTF8(s, "") == s {
			t.Errorf("%q became %q (%v)", s, back, err)
		}
	})
}

func TestAgo(t *testing.T) {
	now := time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)
	for want, d := range map[string]time.Duration{
		"0s": -time.Hour, "119s": 119 * time.Second, "2m": 2 * time.Minute, "2h": 2 * time.Hour, "47h": 47 * time.Hour, "2d": 48 * time.Hour,
	} {
		if got := ago(now, now.Add(-d)); got != want {
			t.Errorf("%s ago is %q, want %q", d, got, want)
		}
	}
	if got := ago(now, time.Time{}); got != "never" {
		t.Errorf("no time is %q", got)
	}
}
