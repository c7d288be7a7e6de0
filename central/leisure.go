package central

import (
	"io"
	"net/http"
	"strings"
	"time"

	musterv1connect "github.com/muster-edge/muster/api/muster/v1/musterv1connect"
)

// Streams of snapshots take longer than any other call. They may, as long as
// something moves; but not for ever.
const (
	streamIdle = time.Minute
	streamMost = 4 * time.Hour
)

var streams = map[string]bool{
	musterv1connect.NodeServicePutEscrowProcedure:         true,
	musterv1connect.NodeServiceGetHandoverProcedure:       true,
	musterv1connect.ManagementServiceFetchEscrowProcedure: true,
	musterv1connect.ManagementServicePutHandoverProcedure: true,
}

// atLeisure moves the deadlines of streams while they make progress. It
// stands behind authentication.
func atLeisure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !streams[r.URL.Path] && !strings.HasPrefix(r.URL.Path, blobsPath) {
			next.ServeHTTP(w, r)
			return
		}
		m := &moving{ResponseWriter: w, c: http.NewResponseController(w), until: time.Now().Add(streamMost)}
		m.move()
		r.Body = &movingBody{r.Body, m}
		next.ServeHTTP(m, r)
	})
}

type moving struct {
	http.ResponseWriter
	c     *http.ResponseController
	until time.Time
}

func (m *moving) move() {
	at := time.Now().Add(streamIdle)
	if at.After(m.until) {
		at = m.until
	}
	// A connection that cannot move its deadlines keeps the short ones.
	_ = m.c.SetReadDeadline(at)
	_ = m.c.SetWriteDeadline(at)
}

// Write implements http.ResponseWriter.
func (m *moving) Write(b []byte) (int, error) {
	m.move()
	return m.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach the connection.
func (m *moving) Unwrap() http.ResponseWriter { return m.ResponseWriter }

// Flush implements http.Flusher.
func (m *moving) Flush() { _ = m.c.Flush() }

type movingBody struct {
	io.ReadCloser
	m *moving
}

// Read implements io.Reader.
func (b *movingBody) Read(p []byte) (int, error) {
	b.m.move()
	return b.ReadCloser.Read(p)
}
