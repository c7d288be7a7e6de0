package server

import (
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/muster-edge/muster/pxe"
)

// Sinks tells several.
type Sinks []EventSink

// Event implements EventSink.
func (s Sinks) Event(e pxe.Event) {
	for _, x := range s {
		x.Event(e)
	}
}

// LogSink logs events.
type LogSink struct{ Log *slog.Logger }

// Event implements EventSink.
func (l LogSink) Event(e pxe.Event) {
	args := []any{"mac", e.MAC.String(), "step", e.Step.String(), "arch", e.Arch.String()}
	if e.Addr.IsValid() {
		args = append(args, "address", e.Addr.String())
	}
	if e.Alarm {
		l.Log.Warn(e.Text, args...)
		return
	}
	l.Log.Info(e.Text, args...)
}

// LineSink writes one line per event for a person at a terminal.
type LineSink struct {
	mu sync.Mutex
	w  io.Writer
}

// NewLineSink writes to w.
func NewLineSink(w io.Writer) *LineSink { return &LineSink{w: w} }

// Event implements EventSink.
func (l *LineSink) Event(e pxe.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A terminal that is gone is no reason to stop booting machines.
	_, _ = fmt.Fprintf(l.w, "%s  %s\n", e.Time.Format("15:04:05"), e)
}
