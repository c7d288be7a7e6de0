package fetch

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// HTTP is a source that serves GET BASE/v1/blobs/DIGEST with Range.
type HTTP struct {
	// Label is its Name.
	Label string
	// Base has no slash at its end.
	Base   string
	Client *http.Client
}

// Name implements Source.
func (h HTTP) Name() string { return h.Label }

// Open implements Source.
func (h HTTP) Open(ctx context.Context, digest Digest, off, n int64) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Base+"/v1/blobs/"+hex.EncodeToString(digest[:]), nil)
	if err != nil {
		return nil, fmt.Errorf("fetch: ask %s: %w", h.Label, err)
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	// Packed, the range would be one of other bytes.
	req.Header.Set("Accept-Encoding", "identity")
	res, err := h.Client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch: ask %s: %w", h.Label, err)
	}
	switch {
	case res.StatusCode == http.StatusPartialContent && rangeFrom(res.Header.Get("Content-Range")) == off:
		return res.Body, nil
	case res.StatusCode == http.StatusOK && off == 0:
		return res.Body, nil
	case res.StatusCode == http.StatusNotFound:
		err = ErrMissing
	case res.StatusCode == http.StatusOK:
		err = fmt.Errorf("fetch: %s does not know Range; it would send everything again", h.Label)
	default:
		err = fmt.Errorf("fetch: %s answers %d %s", h.Label, res.StatusCode, http.StatusText(res.StatusCode))
	}
	res.Body.Close()
	return nil, err
}

// rangeFrom reads where "bytes 0-99/200" begins; -1 if it cannot be read.
func rangeFrom(s string) int64 {
	s, ok := strings.CutPrefix(s, "bytes ")
	from, _, found := strings.Cut(s, "-")
	n, err := strconv.ParseInt(from, 10, 64)
	if !ok || !found || err != nil || n < 0 {
		return -1
	}
	return n
}

// Manifest fetches the envelope of an image, at most most bytes. It believes
// nothing: who calls checks the signature.
func (h HTTP) Manifest(ctx context.Context, image Digest, most int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.Base+"/v1/manifests/"+hex.EncodeToString(image[:]), nil)
	if err != nil {
		return nil, fmt.Errorf("fetch: ask %s: %w", h.Label, err)
	}
	res, err := h.Client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch: ask %s for a manifest: %w", h.Label, err)
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("fetch: ask %s for the manifest of %x: %w", h.Label, image[:8], ErrMissing)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch: ask %s for a manifest: it answers %d %s", h.Label, res.StatusCode, http.StatusText(res.StatusCode))
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, most+1))
	if err != nil {
		return nil, fmt.Errorf("fetch: read the manifest from %s: %w", h.Label, err)
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("fetch: the manifest from %s has more than %d bytes", h.Label, most)
	}
	return b, nil
}
