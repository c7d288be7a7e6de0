package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// What a machine prints is hostile and may be endless; memory is bounded.
const (
	maxLine   = 4096     // longer lines are broken
	maxLines  = 20000    // older lines are forgotten
	maxSerial = 64 << 20 // the log file ends here
)

// Line is one line of the serial console, without control sequences.
type Line struct {
	// N counts lines since the machine was made.
	N int
	// At is when its last character came.
	At time.Time
	// Text is printable.
	Text string
}

// ErrSerialEnded says that the console ended (the machine is off) before a
// line matched.
var ErrSerialEnded = errors.New("machine: the serial console ended")

// Serial follows a serial console: it keeps a log, gives each line to a
// callback and lets callers wait for a line.
type Serial struct {
	onLine func(Line)
	now    func() time.Time

	mu      sync.Mutex
	lines   []Line // the last maxLines, lines[0].N = first
	next    int    // N of the next line
	partial string // what came since the last newline
	ended   bool
	changed chan struct{} // closed and replaced at every change
}

// NewSerial makes a follower; onLine may be nil.
func NewSerial(onLine func(Line)) *Serial {
	return &Serial{onLine: onLine, now: time.Now, changed: make(chan struct{})}
}

// Follow reads a console to its end and copies it to log (nil for none). A
// later Follow continues after a power cycle.
func (s *Serial) Follow(r io.Reader, log io.Writer) error {
	s.mu.Lock()
	s.ended = false
	s.mu.Unlock()
	var c cleaner
	buf := make([]byte, 4096)
	logged := 0
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if log != nil && logged < maxSerial {
				if _, werr := log.Write(buf[:n]); werr != nil {
					log = nil // a full disk must not stop the machine
				}
				logged += n
			}
			s.feed(&c, buf[:n])
		}
		if err != nil {
			s.feed(&c, []byte("\n"))
			s.mu.Lock()
			s.ended = true
			s.wake()
			s.mu.Unlock()
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
				return nil
			}
			return fmt.Errorf("machine: follow serial console: %w", err)
		}
	}
}

// feed takes raw bytes.
func (s *Serial) feed(c *cleaner, raw []byte) {
	now := s.now()
	text := c.clean(raw)
	var fresh []Line
	s.mu.Lock()
	for text != "" {
		head, rest, newline := strings.Cut(text, "\n")
		s.partial += head
		for len(s.partial) > maxLine {
			cut := maxLine
			for !utf8.RuneStart(s.partial[cut]) {
				cut--
			}
			fresh = append(fresh, s.add(s.partial[:cut], now))
			s.partial = s.partial[cut:]
		}
		if newline {
			if strings.TrimSpace(s.partial) != "" {
				fresh = append(fresh, s.add(s.partial, now))
			}
			s.partial = ""
		}
		text = rest
	}
	s.mu.Unlock()
	// The callback knows a line before anybody who waits for it acts on it:
	// what people read is in order.
	if s.onLine != nil {
		for _, l := range fresh {
			s.onLine(l)
		}
	}
	s.mu.Lock()
	s.lines = append(s.lines, fresh...)
	if len(s.lines) > maxLines {
		s.lines = append(s.lines[:0], s.lines[len(s.lines)-maxLines*3/4:]...)
	}
	s.wake()
	s.mu.Unlock()
}

// add numbers a line; mu is held.
func (s *Serial) add(text string, now time.Time) Line {
	l := Line{N: s.next, At: now, Text: strings.TrimRight(text, " ")}
	s.next++
	return l
}

// wake is called with mu held.
func (s *Serial) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Mark returns the number that the next line will have; give it to Wait to
// look only at what comes from now on.
func (s *Serial) Mark() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next
}

// Wait returns the first whole line at or after number from that matches. It
// returns ErrSerialEnded when the machine is off, and the context's error
// with the last line seen.
func (s *Serial) Wait(ctx context.Context, from int, pattern *regexp.Regexp) (Line, error) {
	for {
		s.mu.Lock()
		changed, ended := s.changed, s.ended
		for _, l := range s.lines {
			if l.N >= from && pattern.MatchString(l.Text) {
				s.mu.Unlock()
				return l, nil
			}
		}
		last := "nothing was printed"
		if len(s.lines) > 0 {
			from = max(from, s.lines[len(s.lines)-1].N+1) // seen
			last = fmt.Sprintf("the last line was %q", s.lines[len(s.lines)-1].Text)
		}
		s.mu.Unlock()
		if ended {
			return Line{}, fmt.Errorf("%w before %q came (%s)", ErrSerialEnded, pattern, last)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Line{}, fmt.Errorf("machine: wait for %q on the console: %w (%s)", pattern, ctx.Err(), last)
		}
	}
}

// Find returns the first remembered line that matches.
func (s *Serial) Find(pattern *regexp.Regexp) (Line, bool) { return s.FindSince(0, pattern) }

// FindSince returns the first remembered line at or after number from that
// matches.
func (s *Serial) FindSince(from int, pattern *regexp.Regexp) (Line, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lines {
		if l.N >= from && pattern.MatchString(l.Text) {
			return l, true
		}
	}
	return Line{}, false
}

// Tail returns the last n lines.
func (s *Serial) Tail(n int) []Line {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > len(s.lines) {
		n = len(s.lines)
	}
	return append([]Line(nil), s.lines[len(s.lines)-n:]...)
}

// cleaner turns terminal output into text: it drops control characters and
// escape sequences (ECMA-48: CSI, OSC and two-byte ones), keeps newlines, and
// takes a jump of the cursor to the start of a line for a newline, because
// firmware paints lines with jumps alone. Its state lives from read to read.
type cleaner struct {
	state  byte   // 0 text, 1 after ESC, 2 in CSI, 3 in OSC
	params []byte // of the CSI
	utf    []byte // an incomplete rune
}

func (c *cleaner) clean(raw []byte) string {
	var b strings.Builder
	for _, ch := range raw {
		switch c.state {
		case 1:
			switch ch {
			case '[':
				c.state, c.params = 2, c.params[:0]
			case ']':
				c.state = 3
			case 0x1b:
			default:
				c.state = 0
			}
			continue
		case 2:
			if ch >= 0x40 && ch <= 0x7e {
				if ch == 'H' || ch == 'f' || ch == 'J' {
					b.WriteByte('\n')
				}
				c.state = 0
			} else if ch == 0x1b {
				c.state = 1
			} else if ch < 0x20 || len(c.params) > 32 {
				c.state = 0
			} else {
				c.params = append(c.params, ch)
			}
			continue
		case 3:
			if ch == 0x07 || ch == '\n' {
				c.state = 0
			} else if ch == 0x1b {
				c.state = 1
			}
			continue
		}
		switch {
		case ch == 0x1b:
			c.utf = c.utf[:0]
			c.state = 1
		case ch == '\n':
			c.utf = c.utf[:0]
			b.WriteByte('\n')
		case ch == '\t':
			b.WriteByte(' ')
		case ch < 0x20 || ch == 0x7f:
		case ch < utf8.RuneSelf:
			c.utf = c.utf[:0]
			b.WriteByte(ch)
		default:
			c.utf = append(c.utf, ch)
			if r, n := utf8.DecodeRune(c.utf); r != utf8.RuneError {
				// C1 controls, bidirectional and zero-width characters can
				// change what a person reads.
				if !hidden(r) {
					b.WriteRune(r)
				}
				c.utf = append(c.utf[:0], c.utf[n:]...)
			} else if len(c.utf) >= utf8.UTFMax {
				c.utf = c.utf[:0]
			}
		}
	}
	return b.String()
}

func hidden(r rune) bool {
	return r >= 0x80 && r < 0xa0 || r == 0xad || r == 0x61c || r >= 0x200b && r <= 0x200f ||
		r >= 0x2028 && r <= 0x202e || r >= 0x2060 && r <= 0x206f || r == 0xfeff || r >= 0xe0000 && r <= 0xe0fff
}

// NewTextWriter returns a writer that passes text on without the control
// sequences in it: a machine must not write to a person's terminal.
func NewTextWriter(w io.Writer) io.Writer { return &textWriter{w: w} }

type textWriter struct {
	w io.Writer
	c cleaner
}

func (t *textWriter) Write(p []byte) (int, error) {
	if _, err := io.WriteString(t.w, t.c.clean(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}
