package central

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/central/blobs"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// Paths of files that are found by their digest, on both endpoints.
const (
	blobsPath     = "/v1/blobs/"
	manifestsPath = "/v1/manifests/"
)

// Header fields of an upload.
const (
	HeaderUploadOffset = "Upload-Offset"
	HeaderUploadLength = "Upload-Length"
)

const (
	blobsDir = "blobs"
	// maxBlob is above the largest root of a slot.
	maxBlob = 16 << 30
	// blobGrace is how long a file may be without a manifest or a stack
	// version that names it: uploads come before them.
	blobGrace = 24 * time.Hour
	// downloadsPerNode and downloads bound what runs at once. Both count
	// nodes, never addresses: a chain of shops may stand behind one.
	downloadsPerNode = 8
	downloads        = 512
)

// blobQuota is what BlobQuota is when nobody chose.
const blobQuota = 64 << 30

// blobRefused is a refusal with its HTTP status.
type blobRefused struct {
	status int
	why    string
}

func (e *blobRefused) Error() string { return e.why }

func (s *Server) blobFails(w http.ResponseWriter, r *http.Request, err error) {
	var (
		refused *blobRefused
		offset  *blobs.OffsetError
	)
	switch {
	case errors.As(err, &refused):
		if refused.status == http.StatusServiceUnavailable || refused.status == http.StatusTooManyRequests {
			w.Header().Set("Retry-After", "10")
		}
		http.Error(w, refused.why, refused.status)
	case errors.As(err, &offset):
		w.Header().Set(HeaderUploadOffset, strconv.FormatInt(offset.Have, 10))
		http.Error(w, err.Error(), http.StatusConflict)
	case errors.Is(err, blobs.ErrBusy):
		w.Header().Set("Retry-After", "2")
		http.Error(w, err.Error(), http.StatusLocked)
	case errors.Is(err, blobs.ErrDigest):
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	case errors.Is(err, store.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		http.Error(w, "there is no such file here", http.StatusNotFound)
	case r.Context().Err() != nil:
		// The peer is gone.
	default:
		s.log.Error("call failed", logMethod, r.Method+" "+blobsPath, logError, err)
		http.Error(w, "it did not work; the centre's log says why", http.StatusInternalServerError)
	}
}

func digestOf(r *http.Request) (blobs.Digest, error) {
	d, err := blobs.ParseDigest(r.PathValue("sha256"))
	if err != nil {
		return d, &blobRefused{http.StatusBadRequest, err.Error()}
	}
	return d, nil
}

// transfers counts the downloads of each node.
type transfers struct {
	mu    sync.Mutex
	all   int
	nodes map[fleet.NodeID]int
}

func (t *transfers) enter(id fleet.NodeID) (leave func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.nodes[id] >= downloadsPerNode {
		return nil, &blobRefused{http.StatusTooManyRequests, "this node downloads a lot just now; try again in a moment"}
	}
	if t.all >= downloads {
		return nil, &blobRefused{http.StatusServiceUnavailable, "many nodes download just now; try again in a moment"}
	}
	if t.nodes == nil {
		t.nodes = make(map[fleet.NodeID]int)
	}
	t.all++
	t.nodes[id]++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.all--
		if t.nodes[id]--; t.nodes[id] <= 0 {
			delete(t.nodes, id)
		}
	}, nil
}

// admitted lets nodes of a site through, up to the bound of downloads.
func (s *Server) admitted(serve func(http.ResponseWriter, *http.Request, string) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		err := func() error {
			c, ok := r.Context().Value(nodeCallerKey{}).(nodeCaller)
			e, there := s.index.get(c.id)
			if !ok || !there || e.site == "" {
				return &blobRefused{http.StatusForbidden, "files are for nodes that belong to a site: muster assign NODE --site SITE"}
			}
			leave, err := s.transfers.enter(c.id)
			if err != nil {
				return err
			}
			defer leave()
			return serve(w, r, e.tenant)
		}()
		if err != nil {
			s.blobFails(w, r, err)
		}
	})
}

// serveBlob answers GET and HEAD of a file. Envelopes of stack versions are
// files too: they are in the database.
func (s *Server) serveBlob(w http.ResponseWriter, r *http.Request, tenant string) error {
	id, err := digestOf(r)
	if err != nil {
		return err
	}
	var envelope []byte
	err = s.store.View(r.Context(), func(t store.Reader) error {
		envelope = nil
		if _, err := t.Blob(tenant, id[:]); !errors.Is(err, store.ErrNotFound) {
			return err
		}
		v, err := t.StackVersionBySHA256(tenant, id[:])
		envelope = v.Envelope
		return err
	})
	if err != nil {
		return err
	}
	if envelope != nil {
		serveDigest(w, r, id, "application/json", newBytesFile(envelope))
		return nil
	}
	f, err := s.blobs.File(id)
	if err != nil {
		return err
	}
	defer f.Close()
	serveDigest(w, r, id, "application/octet-stream", f)
	return nil
}

// serveManifest answers GET and HEAD of an image's signed manifest, by the
// digest of its UKI.
func (s *Server) serveManifest(w http.ResponseWriter, r *http.Request, tenant string) error {
	id, err := digestOf(r)
	if err != nil {
		return err
	}
	var image fleet.Image
	err = s.store.View(r.Context(), func(t store.Reader) error {
		image, err = t.ImageBySHA256(tenant, id[:])
		return err
	})
	if err != nil {
		return err
	}
	serveDigest(w, r, id, "application/json", newBytesFile(image.Manifest))
	return nil
}

// uploads answers operators: HEAD says how much of a file is there, PATCH adds
// a piece to it, GET gives it.
func (s *Server) uploads(w http.ResponseWriter, r *http.Request) {
	err := func() error {
		id, err := digestOf(r)
		if err != nil {
			return err
		}
		c := callerOf(r.Context())
		switch r.Method {
		case http.MethodGet:
			return s.serveBlob(w, r, c.Tenant)
		case http.MethodHead:
			return s.uploadState(w, r, c, id)
		case http.MethodPatch:
			return s.upload(w, r, c, id)
		}
		w.Header().Set("Allow", "GET, HEAD, PATCH")
		return &blobRefused{http.StatusMethodNotAllowed, "want GET, HEAD or PATCH"}
	}()
	if err != nil {
		s.blobFails(w, r, err)
	}
}

func (s *Server) uploadState(w http.ResponseWriter, r *http.Request, c caller, id blobs.Digest) error {
	err := s.store.View(r.Context(), func(t store.Reader) error {
		_, err := t.Blob(c.Tenant, id[:])
		return err
	})
	if err == nil {
		// Who asks is about to send it: a file that went bad on our disk must
		// not be in the way of a good one.
		sound, err := s.blobs.Check(id)
		if err != nil {
			return err
		}
		if sound {
			return s.serveBlob(w, r, c.Tenant)
		}
		s.log.Error("a file is damaged or gone; it has to be sent again", "sha256", id.String())
	} else if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	// A whole file that does not count for this tenant is said to be missing:
	// who knows a digest does not learn that another tenant has the file.
	have, whole, err := s.blobs.State(id)
	if err != nil {
		return err
	}
	if whole {
		have = 0
	}
	w.Header().Set(HeaderUploadOffset, strconv.FormatInt(have, 10))
	w.WriteHeader(http.StatusNotFound)
	return nil
}

// upload takes a piece. What it acknowledges is on the disk.
func (s *Server) upload(w http.ResponseWriter, r *http.Request, c caller, id blobs.Digest) error {
	offset, errO := strconv.ParseInt(r.Header.Get(HeaderUploadOffset), 10, 64)
	size, errL := strconv.ParseInt(r.Header.Get(HeaderUploadLength), 10, 64)
	if errO != nil || errL != nil || offset < 0 || size <= 0 || offset > size {
		return &blobRefused{http.StatusBadRequest, "the header fields " + HeaderUploadOffset + " and " + HeaderUploadLength + " say where the piece begins and how long the file is"}
	}
	if size > maxBlob {
		return &blobRefused{http.StatusRequestEntityTooLarge, fmt.Sprintf("a file of %d bytes; at most %d are allowed", size, int64(maxBlob))}
	}
	existed := false
	err := s.store.View(r.Context(), func(t store.Reader) error {
		_, err := t.Blob(c.Tenant, id[:])
		if err == nil { // counted already, also if its file was damaged and is sent again
			_, existed, err = s.blobs.State(id)
			return err
		}
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		return s.roomFor(t, c.Tenant, id, size)
	})
	if err != nil {
		return err
	}
	if existed {
		w.Header().Set(HeaderUploadOffset, strconv.FormatInt(size, 10))
		w.WriteHeader(http.StatusOK)
		return nil
	}
	have, whole, err := s.blobs.Append(id, size, offset, r.Body)
	if err != nil {
		return err
	}
	w.Header().Set(HeaderUploadOffset, strconv.FormatInt(have, 10))
	if !whole {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	if have != size {
		return &blobRefused{http.StatusConflict, fmt.Sprintf("the file with this digest has %d bytes, not %d", have, size)}
	}
	// The file must be there after its row is: see tidyBlobs.
	s.tidying.RLock()
	defer s.tidying.RUnlock()
	err = s.store.Update(r.Context(), func(t store.Tx) error {
		if _, whole, err := s.blobs.State(id); err != nil {
			return err
		} else if !whole {
			return &blobs.OffsetError{}
		}
		if _, err := t.Blob(c.Tenant, id[:]); err == nil {
			return nil // the file was damaged and came again
		}
		err := t.AddBlob(store.Blob{Tenant: c.Tenant, SHA256: id[:], Size: have, Stored: s.cfg.Now().UTC(), By: c.actor()})
		if errors.Is(err, store.ErrExists) {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	s.log.Info("file received", "sha256", id.String(), "bytes", have)
	w.WriteHeader(http.StatusCreated)
	return nil
}

// roomFor refuses a file for which there is no room. Files that came in part
// count as what is there of them.
func (s *Server) roomFor(t store.Reader, tenant string, id blobs.Digest, size int64) error {
	used, err := t.BlobBytes(tenant)
	if err != nil {
		return err
	}
	pending, err := s.blobs.Pending()
	if err != nil {
		return err
	}
	have, _, err := s.blobs.State(id)
	if err != nil {
		return err
	}
	if used+pending+max(size-have, 0) > s.cfg.BlobQuota {
		return &blobRefused{http.StatusInsufficientStorage, fmt.Sprintf("the centre keeps %d bytes of files and may keep %d: withdraw old images, or give it more (muster serve --blob-quota)", used+pending, s.cfg.BlobQuota)}
	}
	return nil
}

// named are the digests of all files that an image or a stack version of the
// tenant names.
func named(t store.Reader, tenant string) (map[blobs.Digest]bool, error) {
	out := make(map[blobs.Digest]bool)
	images, err := t.Images(tenant)
	if err != nil {
		return nil, err
	}
	for _, i := range images {
		m, err := manifestOf(i)
		if err != nil {
			return nil, err
		}
		for _, f := range m.Files() {
			out[blobs.Digest(f.SHA256)] = true
		}
	}
	stacks, err := t.Stacks(tenant)
	if err != nil {
		return nil, err
	}
	for _, k := range stacks {
		versions, err := t.StackVersions(tenant, k.Name)
		if err != nil {
			return nil, err
		}
		for _, v := range versions {
			sv, err := versionOf(v)
			if err != nil {
				return nil, err
			}
			for _, a := range charts(sv) {
				out[blobs.Digest(a.SHA256)] = true
			}
		}
	}
	return out, nil
}

// charts are all charts of a stack version.
func charts(v fleet.StackVersion) []fleet.AddOn {
	out := append([]fleet.AddOn{}, v.AddOns...)
	for _, a := range v.Apps {
		out = append(out, a.AddOn)
	}
	return out
}

// manifestOf reads the manifest of an image that was registered: its signature
// was checked then.
func manifestOf(i fleet.Image) (firmware.Manifest, error) {
	env, err := statement.Parse(i.Manifest)
	if err != nil {
		return firmware.Manifest{}, fmt.Errorf("central: read manifest of %s: %w", i.ID(), err)
	}
	m, err := firmware.ParseManifest(env.Payload)
	if err != nil {
		return m, fmt.Errorf("central: read manifest of %s: %w", i.ID(), err)
	}
	return m, nil
}

// tidyBlobs drops files that nothing names any more, and what is left of
// uploads that nobody goes on with.
func (s *Server) tidyBlobs(ctx context.Context) error {
	now := s.cfg.Now()
	var gone []store.Blob
	err := s.store.Update(ctx, func(t store.Tx) error {
		gone = nil
		keep, err := named(t, DefaultTenant)
		if err != nil {
			return err
		}
		for after := (fleet.HexBytes)(nil); ; {
			list, err := t.Blobs(DefaultTenant, after, sweepBatch)
			if err != nil || len(list) == 0 {
				return err
			}
			for _, b := range list {
				if keep[blobs.Digest(b.SHA256)] || now.Sub(b.Stored) < blobGrace {
					continue
				}
				if err := t.DropBlob(b.Tenant, b.SHA256); err != nil {
					return err
				}
				gone = append(gone, b)
			}
			after = list[len(list)-1].SHA256
		}
	})
	if err != nil {
		return err
	}
	n, err := s.blobs.Tidy(now.Add(-blobGrace))
	if err != nil {
		return err
	}
	// Files without a row: of rows that were just dropped, and of a crash
	// between a file and its row. A young one may be getting its row now.
	err = s.blobs.Whole(func(id blobs.Digest, info fs.FileInfo) error {
		if now.Sub(info.ModTime()).Abs() < time.Hour && !dropped(gone, id) {
			return nil
		}
		s.tidying.Lock()
		defer s.tidying.Unlock()
		err := s.store.View(ctx, func(t store.Reader) error {
			_, err := t.Blob(DefaultTenant, id[:])
			return err
		})
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		n++
		if err := s.blobs.Remove(id); err != nil && !errors.Is(err, blobs.ErrBusy) {
			return err
		}
		return nil
	})
	if n > 0 {
		s.log.Info("files removed that nothing names", logCount, n)
	}
	return err
}

func dropped(gone []store.Blob, id blobs.Digest) bool {
	for _, b := range gone {
		if blobs.Digest(b.SHA256) == id {
			return true
		}
	}
	return false
}

// statusOf is the HTTP status of a refusal, for callers that do not speak the
// protocol of the other calls.
func statusOf(err error) int {
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated:
		return http.StatusUnauthorized
	case connect.CodePermissionDenied:
		return http.StatusForbidden
	case connect.CodeNotFound:
		return http.StatusNotFound
	case connect.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}
