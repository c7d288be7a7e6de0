package console

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

const eventsShown = 200

type eventsBody struct{ Rows []fleet.Event }

// events shows the newest events; the page looks again when there are more.
func (c *Console) events(v *visit) error {
	stream, err := c.api.WatchEvents(v.ctx, &musterv1.WatchEventsRequest{Tail: eventsShown})
	if err != nil {
		return err
	}
	defer stream.Close() //nolint:errcheck // it was only read
	var b eventsBody
	for stream.Receive() {
		m := stream.Msg().Event
		if m == nil {
			continue
		}
		e, err := api.EventFromProto(m)
		if err != nil {
			return err
		}
		b.Rows = append(b.Rows, e)
	}
	if err := stream.Err(); err != nil {
		return err
	}
	if n := len(b.Rows); n > eventsShown {
		b.Rows = b.Rows[n-eventsShown:]
	}
	slices.Reverse(b.Rows)
	return v.show(http.StatusOK, "events", page{Title: "Events", Nav: "events", Live: "*", CLI: []string{command("events", "--follow")}, Body: b})
}

// streams counts open live updates.
type streams struct {
	most, each int

	mu  sync.Mutex
	all int
	of  map[string]int
}

func newStreams(most, each int) *streams {
	return &streams{most: most, each: each, of: make(map[string]int)}
}

func (s *streams) enter(who string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= s.most || s.of[who] >= s.each {
		return false
	}
	s.all++
	s.of[who]++
	return true
}

func (s *streams) leave(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.of[who]--; s.of[who] <= 0 {
		delete(s.of, who)
	}
}

const (
	// liveLife ends a stream that nobody ends; the browser opens another one.
	liveLife = time.Hour
	// liveEvery is the shortest time between two messages: a storm of events
	// is one look, not a thousand.
	liveEvery = time.Second
	liveBeat  = 15 * time.Second
	liveWrite = 10 * time.Second
)

// live tells the browser that something changed, by server-sent events. It
// carries kinds of events and no text of theirs: the page asks for the rest.
func (c *Console) live(v *visit) error {
	who := cookieOf(v.r, sessionCookie)
	if !c.streams.enter(who) {
		v.w.Header().Set("Retry-After", "30")
		http.Error(v.w, "too many live pages are open", http.StatusTooManyRequests)
		return nil
	}
	defer c.streams.leave(who)
	stream, err := c.api.WatchEvents(v.ctx, &musterv1.WatchEventsRequest{Tail: 1, Follow: true})
	if err != nil {
		return err
	}
	defer stream.Close() //nolint:errcheck // it was only read
	kinds := make(chan string, 64)
	go func() {
		defer close(kinds)
		first := true
		for stream.Receive() {
			e := stream.Msg().Event
			if e == nil {
				continue
			}
			if first && e.Time.AsTime().Before(c.cfg.Now().Add(-2*liveEvery)) {
				first = false
				continue // the tail, from before the page was made
			}
			select {
			case kinds <- e.Kind:
			case <-v.ctx.Done():
				return
			}
		}
	}()
	h := v.w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no")
	control := http.NewResponseController(v.w)
	_ = control.SetReadDeadline(time.Time{}) // not every connection has one
	v.w.WriteHeader(http.StatusOK)
	say := func(format string, args ...any) error {
		_ = control.SetWriteDeadline(time.Now().Add(liveWrite))
		if _, err := fmt.Fprintf(v.w, format, args...); err != nil {
			return err
		}
		return control.Flush()
	}
	if say("retry: 5000\nevent: hello\ndata: {}\n\n") != nil {
		return nil
	}
	beat, end := time.NewTicker(liveBeat), time.NewTimer(liveLife)
	defer beat.Stop()
	defer end.Stop()
	var waiting []string
	var flush <-chan time.Time
	for {
		select {
		case k, open := <-kinds:
			if !open {
				return nil
			}
			if !slices.Contains(waiting, k) && len(waiting) < 64 {
				waiting = append(waiting, k)
			}
			if flush == nil {
				flush = time.After(liveEvery)
			}
		case <-flush:
			b, err := json.Marshal(waiting)
			if err != nil || say("event: change\ndata: %s\n\n", b) != nil {
				return nil
			}
			waiting, flush = nil, nil
		case <-beat.C:
			// A session that ended gets no more news.
			if _, err := c.cfg.Gate.Session(v.r); err != nil || say(": beat\n\n") != nil {
				return nil
			}
		case <-end.C:
			return nil
		case <-v.r.Context().Done():
			return nil
		case <-c.cfg.Stopping:
			return nil
		}
	}
}
