package central

import (
	"io"
	"net/http"
	"sync"

	"github.com/muster-edge/muster/fleet/access"
)

// Inside returns a transport that calls the management API of this very
// process, as the principal in the request's context (access.NewContext). The
// console is such a client: it goes through the same gate, the same methods
// and the same codes as everybody, with no socket between.
//
//	client := musterv1connect.NewManagementServiceClient(&http.Client{Transport: s.Inside()}, "http://inside")
//	answer, err := client.ListNodes(access.NewContext(r.Context(), principal), &musterv1.ListNodesRequest{})
func (s *Server) Inside() http.RoundTripper { return inside{s.managementHandler()} }

type inside struct{ handler http.Handler }

// RoundTrip implements http.RoundTripper.
func (i inside) RoundTrip(r *http.Request) (*http.Response, error) {
	if _, ok := access.FromContext(r.Context()); !ok {
		// Else the gate would look for a bearer token, and the mistake would
		// look like one of the user's.
		return nil, errNoPrincipal
	}
	in := r.Clone(r.Context())
	in.RequestURI = r.URL.RequestURI()
	if in.Body == nil {
		in.Body = http.NoBody
	}
	body, pipe := io.Pipe()
	w := &pipeWriter{pipe: pipe, header: make(http.Header), ready: make(chan struct{})}
	go func() {
		defer in.Body.Close()
		i.handler.ServeHTTP(w, in)
		w.WriteHeader(http.StatusOK)
		_ = pipe.Close() // always nil
	}()
	select {
	case <-w.ready:
	case <-r.Context().Done():
		_ = body.CloseWithError(r.Context().Err()) // always nil; writes fail from here on
		return nil, r.Context().Err()
	}
	return &http.Response{
		Status: http.StatusText(w.status), StatusCode: w.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.sent, Body: body, ContentLength: -1, Request: r,
	}, nil
}

// pipeWriter hands what a handler writes to who reads the pipe.
type pipeWriter struct {
	pipe   *io.PipeWriter
	header http.Header
	once   sync.Once
	ready  chan struct{}
	status int
	sent   http.Header
}

// Header implements http.ResponseWriter.
func (w *pipeWriter) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *pipeWriter) WriteHeader(status int) {
	w.once.Do(func() {
		w.status, w.sent = status, w.header.Clone()
		close(w.ready)
	})
}

// Write implements http.ResponseWriter.
func (w *pipeWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.pipe.Write(b)
}

// Flush implements http.Flusher: nothing is held back.
func (w *pipeWriter) Flush() { w.WriteHeader(http.StatusOK) }
