package central

import (
	"bytes"
	"io"
	"net/http"
	"time"

	"github.com/muster-edge/muster/central/blobs"
)

// newBytesFile is a file in memory.
func newBytesFile(b []byte) io.ReadSeeker { return bytes.NewReader(b) }

// serveDigest answers GET and HEAD, ranges and conditions of a file that can
// never change under its name.
func serveDigest(w http.ResponseWriter, r *http.Request, id blobs.Digest, kind string, f io.ReadSeeker) {
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("ETag", `"`+id.String()+`"`)
	h.Set("Cache-Control", "private, max-age=31536000, immutable")
	h.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", time.Time{}, f)
}
