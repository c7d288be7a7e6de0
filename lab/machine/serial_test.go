package machine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestSerialWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []string
		s := NewSerial(func(l Line) { seen = append(seen, l.Text) })
		r, w := io.Pipe()
		var log bytes.Buffer
		go func() {
			if err := s.Follow(r, &log); err != nil {
				t.Error(err)
			}
		}()
		got := make(chan Line)
		go func() {
			l, err := s.Wait(t.Context(), 0, regexp.MustCompile(`init started`))
			if err != nil {
				t.Error(err)
			}
			got <- l
		}()
		write := func(text string) {
			if _, err := io.WriteString(w, text); err != nil {
				t.Error(err)
			}
			synctest.Wait()
		}
		// Split across reads, inside an escape sequence and inside a word.
		write("\x1b[2J\x1b[01;")
		write("01HBdsDxe: loading\r\nmuster-node: init sta")
		select {
		case l := <-got:
			t.Fatalf("matched too early: %v", l)
		default:
		}
		write("rted (1.0)\r\n")
		if l := <-got; l.Text != "muster-node: init started (1.0)" || l.N != 1 {
			t.Errorf("line %+v", l)
		}
		mark := s.Mark()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Wait(ctx, mark, regexp.MustCompile(`init started`)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "init started (1.0)") {
			t.Errorf("old lines count after a mark, or the error does not show the last line: %v", err)
		}
		write("login: ")
		_ = w.Close()
		synctest.Wait()
		if _, err := s.Wait(t.Context(), 0, regexp.MustCompile(`never`)); !errors.Is(err, ErrSerialEnded) {
			t.Errorf("after the end: %v", err)
		}
		if want := []string{"BdsDxe: loading", "muster-node: init started (1.0)", "login:"}; strings.Join(seen, "|") != strings.Join(want, "|") {
			t.Errorf("lines %q, want %q", seen, want)
		}
		if !bytes.Contains(log.Bytes(), []byte("\x1b[2J")) {
			t.Error("the log file is not the raw console")
		}
	})
}

func TestSerialWhenFloodedThenMemoryIsBounded(t *testing.T) {
	s := NewSerial(nil)
	flood := strings.NewReader(strings.Repeat("x", 3*maxLine) + "\n" + strings.Repeat("y\n", 2*maxLines))
	if err := s.Follow(flood, nil); err != nil {
		t.Fatal(err)
	}
	if len(s.lines) > maxLines {
		t.Errorf("%d lines are kept", len(s.lines))
	}
	for _, l := range s.lines {
		if len(l.Text) > maxLine {
			t.Fatalf("a line of %d bytes", len(l.Text))
		}
	}
	if s.Mark() != 2*maxLines+3 {
		t.Errorf("%d lines were counted", s.Mark())
	}
}

func TestCleaner(t *testing.T) {
	for in, want := range map[string]string{
		"plain\r\n":                   "plain\n",
		"\x1b[1;31mred\x1b[0m":        "red",
		"\x1b]0;window title\x07text": "text",
		"a\x1b[10;20Hb":               "a\nb",
		"\u202egnp.exe\u200b":         "gnp.exe",
		"\u009b31mC1":                 "31mC1",
		"\xff\xfe\xfd\xfcok":          "ok",
		"caf\u00e9 \u65e5":            "caf\u00e9 \u65e5",
		"\x1b\x1b[31mx":               "x",
		"\x1b[" + strings.Repeat("1", 100) + "mtext": strings.Repeat("1", 66) + "mtext",
	} {
		var c cleaner
		if got := c.clean([]byte(in)); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func FuzzCleaner(f *testing.F) {
	f.Add([]byte("\x1b[31mx\x1b]0;t\x07\n"), 3)
	f.Add([]byte("\u202e\xe2\x80\xae"), 1)
	f.Fuzz(func(t *testing.T, raw []byte, cut int) {
		if cut < 0 || cut > len(raw) {
			cut = len(raw) / 2
		}
		var whole, parts cleaner
		a := whole.clean(raw)
		b := parts.clean(raw[:cut]) + parts.clean(raw[cut:])
		if a != b {
			t.Fatalf("cut at %d changes the text: %q, %q", cut, a, b)
		}
		if !utf8.ValidString(a) {
			t.Fatalf("not UTF-8: %q", a)
		}
		for _, r := range a {
			if r != '\n' && unicode.IsControl(r) || hidden(r) {
				t.Fatalf("%q let %U through", raw, r)
			}
		}
	})
}
