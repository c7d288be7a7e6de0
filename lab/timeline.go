package lab

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Moment is one entry of a run's time line (events.jsonl).
type Moment struct {
	// T is seconds since the run began, by the monotonic clock.
	T float64 `json:"t_s"`
	// Source is a machine's name, "lab", "boot host" or "centre".
	Source string `json:"source"`
	// Event is a short constant for programs.
	Event string `json:"event"`
	// Text is for people.
	Text string `json:"text,omitempty"`
}

const eventsFile = "events.jsonl"

// timeline writes moments to the run's directory and, for people, to a
// terminal.
type timeline struct {
	began time.Time

	mu     sync.Mutex
	file   io.WriteCloser
	people io.Writer
	// footer is what stands below the last line on the terminal, drawn how
	// many lines high.
	footer string
	drawn  int
}

func newTimeline(dir string, began time.Time, people io.Writer) (*timeline, error) {
	f, err := os.OpenFile(filepath.Join(dir, eventsFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lab: open events: %w", err)
	}
	return &timeline{began: began, file: f, people: people}, nil
}

// add records what happened at a time; show prints it for people.
func (t *timeline) add(at time.Time, source, event, text string, show bool) {
	m := Moment{T: seconds(at.Sub(t.began).Seconds()), Source: source, Event: event, Text: text}
	b, err := json.Marshal(m)
	if err != nil {
		return // strings and a number: cannot happen
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	// A full disk shows in the result's files; the run goes on.
	_, _ = t.file.Write(append(b, '\n'))
	if show && t.people != nil {
		t.erase()
		_, _ = fmt.Fprintf(t.people, "[%6.1fs] %s: %s\n", m.T, source, text)
		t.draw()
	}
}

// setFooter shows text below the time line, for a terminal only; "" ends it.
func (t *timeline) setFooter(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.people == nil || text == t.footer {
		return
	}
	t.erase()
	t.footer = text
	t.draw()
}

// erase takes the footer away: up, and clear to the end (ECMA-48 CUU, ED).
func (t *timeline) erase() {
	if t.drawn > 0 {
		_, _ = fmt.Fprintf(t.people, "\x1b[%dA\x1b[J", t.drawn)
		t.drawn = 0
	}
}

func (t *timeline) draw() {
	if t.footer == "" {
		return
	}
	_, _ = io.WriteString(t.people, t.footer)
	t.drawn = strings.Count(t.footer, "\n")
}

func (t *timeline) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.file.Close()
}
