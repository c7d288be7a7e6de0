package central

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/internal/flush"
)

// keyIDOf names an X25519 public key: the first 8 bytes of its SHA-256, hex.
func keyIDOf(key []byte) string {
	if len(key) == 0 {
		return ""
	}
	return escrow.KeyID(key)
}

// trustEscrowKey sets the key that sites seal their snapshots to. The charters
// follow.
func (s *Server) trustEscrowKey(ctx context.Context, c caller, key []byte, reason string) (changed bool, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		tenant, err := t.Tenant(c.Tenant)
		if err != nil {
			return err
		}
		if changed = !bytes.Equal(tenant.EscrowKey, key); !changed {
			return nil
		}
		before := keyIDOf(tenant.EscrowKey)
		tenant.EscrowKey = key
		if err := tenant.Validate(); err != nil {
			return &enroll.Refused{Why: err.Error()}
		}
		if _, err := t.PutTenant(tenant); err != nil {
			return err
		}
		if err := by.record(t, c.Tenant, audit.TenantChanged, "tenant/"+c.Tenant, map[string]string{"escrow_key": before}, map[string]string{"escrow_key": keyIDOf(key)}, reason); err != nil {
			return err
		}
		_, err = t.AddEvent(cleanEvent(fleet.Event{
			Tenant: c.Tenant, Time: by.now, Level: fleet.EventWarning, Kind: "tenant.escrow-key",
			Text: fmt.Sprintf("the escrow key is %s now (%s)", keyIDOf(key), by.actor),
		}))
		return err
	})
	if err == nil && changed {
		s.documentsStale()
		s.hub.changed(eventsTopic(c.Tenant))
	}
	return changed, err
}

// Limits of what sites may put here.
const (
	escrowDir = "escrow"
	// Of each node the newest so many blobs are kept; a node cannot push out
	// what others stored.
	escrowPerNode = 4
	// And of its disk's recovery key, which snapshots must not push out.
	diskKeysPerNode = 2
	// handoversPerNode and handoverLife bound what operators leave for a node.
	handoversPerNode = 4
	handoverLife     = 7 * 24 * time.Hour
	// escrowUploads bounds the uploads that run at once.
	escrowUploads = 8
	// escrowEvery is how often one node may store a blob.
	escrowEvery = time.Minute
	maxPiece    = 256 << 10
	tmpPrefix   = ".tmp-"
)

// vault keeps sealed blobs as files; the database says which of them count. A
// file that it does not name is rubbish of a crash.
type vault struct {
	dir string
	// perSite bounds the bytes of one site.
	perSite int64
	// young is how old a file must be before tidy removes it.
	young time.Duration
	slots chan struct{}

	mu     sync.Mutex
	active map[string]time.Time // by uploader: zero while it uploads
}

func openVault(dir string, perSite int64) (*vault, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("central: make escrow directory: %w", err)
	}
	return &vault{dir: dir, perSite: perSite, slots: make(chan struct{}, escrowUploads), active: make(map[string]time.Time)}, nil
}

func (v *vault) path(tenant, id string) string { return filepath.Join(v.dir, tenant, id) }

// enter admits one upload of who at a time, and one in every so often; and one
// upload of a blob at a time, since two would write and remove the same file.
func (v *vault) enter(who, blob string, now time.Time, every time.Duration) (leave func(done bool), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, there := v.active[blob]; there {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("this blob is being stored just now; try again in a minute"))
	}
	if last, there := v.active[who]; there && (last.IsZero() || now.Sub(last).Abs() < every) {
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("too many uploads; try again in a minute"))
	}
	select {
	case v.slots <- struct{}{}:
	default:
		return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("the centre takes other uploads just now; try again in a minute"))
	}
	for old, at := range v.active {
		if !at.IsZero() && now.Sub(at).Abs() > escrowEvery {
			delete(v.active, old)
		}
	}
	v.active[who], v.active[blob] = time.Time{}, time.Time{}
	return func(done bool) {
		<-v.slots
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(v.active, blob)
		if done {
			v.active[who] = now
		} else {
			delete(v.active, who)
		}
	}, nil
}

// receive writes a blob to a temporary file, hashing it, and flushes it. It
// gives the file its name only if size and hash are as announced.
func (v *vault) receive(tenant string, size int64, want []byte, next func() ([]byte, error)) (id string, head escrow.Header, err error) {
	id = fleet.EscrowID([32]byte(want))
	dir := filepath.Join(v.dir, tenant)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", head, fmt.Errorf("central: store blob: %w", err)
	}
	f, err := os.CreateTemp(dir, tmpPrefix)
	if err != nil {
		return "", head, fmt.Errorf("central: store blob: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	sum := sha256.New()
	var got int64
	for {
		b, err := next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", head, err
		}
		if got += int64(len(b)); got > size || len(b) > maxPiece {
			return "", head, connect.NewError(connect.CodeInvalidArgument, errors.New("more bytes than announced"))
		}
		sum.Write(b)
		if _, err := f.Write(b); err != nil {
			return "", head, fmt.Errorf("central: store blob: %w", err)
		}
	}
	if got != size || !bytes.Equal(sum.Sum(nil), want) {
		return "", head, connect.NewError(connect.CodeInvalidArgument, errors.New("the bytes are not the announced ones"))
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", head, fmt.Errorf("central: store blob: %w", err)
	}
	if head, err = escrow.Inspect(f); err != nil {
		return "", head, connect.NewError(connect.CodeInvalidArgument, err)
	}
	failpoint.Hit("escrow.before-sync")
	if err := f.Sync(); err != nil {
		return "", head, fmt.Errorf("central: store blob: %w", err)
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, id)); err != nil {
		return "", head, fmt.Errorf("central: store blob: %w", err)
	}
	failpoint.Hit("escrow.after-rename")
	return id, head, syncDir(dir)
}

func syncDir(dir string) error {
	if err := flush.Dir(dir); err != nil {
		return fmt.Errorf("central: %w", err)
	}
	return nil
}

// drop removes files whose rows are gone. What stays is rubbish that the next
// start removes.
func (v *vault) drop(tenant string, ids []string) {
	for _, id := range ids {
		_ = os.Remove(v.path(tenant, id)) // the next start tries again
	}
}

// dropUnnamed removes a blob's file unless the database names it meanwhile: an
// upload of the same blob may have been faster.
func (s *Server) dropUnnamed(ctx context.Context, tenant, id string) {
	err := s.store.View(context.WithoutCancel(ctx), func(t store.Reader) error {
		_, err := t.Escrow(tenant, id)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		s.vault.drop(tenant, []string{id})
	}
}

// tidy removes files that the database does not name: of uploads that a crash
// cut, and of blobs that were dropped.
func (v *vault) tidy(ctx context.Context, s store.Store, tenant string) (removed int, err error) {
	named := make(map[string]bool)
	if err := s.View(ctx, func(t store.Reader) error {
		for after := ""; ; {
			blobs, err := t.EscrowAfter(tenant, after, 1000)
			if err != nil || len(blobs) == 0 {
				return err
			}
			for _, b := range blobs {
				named[b.ID] = true
			}
			after = blobs[len(blobs)-1].ID
		}
	}); err != nil {
		return 0, err
	}
	entries, err := os.ReadDir(filepath.Join(v.dir, tenant))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("central: tidy escrow: %w", err)
	}
	for _, e := range entries {
		if named[e.Name()] {
			continue
		}
		// Other replicas may share the directory and be about to commit.
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) < v.young {
			continue
		}
		if err := os.Remove(v.path(tenant, e.Name())); err != nil {
			return removed, fmt.Errorf("central: tidy escrow: %w", err)
		}
		removed++
	}
	return removed, nil
}

// checkAnnounced checks what an uploader says before the first byte.
func checkAnnounced(sum []byte, size int64) error {
	if len(sum) != sha256.Size || size <= 0 || size > escrow.MaxBlob {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("want a SHA-256 and a size of 1 to %d bytes", int64(escrow.MaxBlob)))
	}
	return nil
}

// keepBlob adds the row of a received blob, and drops what its coming makes
// too much. The file is on disk; the row makes it count.
func keepBlob(t store.Tx, b fleet.EscrowBlob, perSite int64) (gone []string, err error) {
	all, err := t.EscrowOfSite(b.Tenant, b.Site, 10000)
	if err != nil {
		return nil, err
	}
	limit := escrowPerNode
	switch {
	case b.For != "":
		limit = handoversPerNode
	case b.Kind == escrow.KindDiskKey:
		limit = diskKeysPerNode
	}
	used, own := b.Size, 1
	for _, o := range all { // newest first
		mine := o.For == b.For && (b.For != "" || o.Node == b.Node && o.Kind == b.Kind)
		// A handover that nobody fetched in a week is not waited for.
		old := o.For != "" && b.Stored.Sub(o.Stored) > handoverLife
		if mine {
			own++
		}
		if mine && own > limit || old {
			if err := t.DropEscrow(o.Tenant, o.ID); err != nil {
				return nil, err
			}
			gone = append(gone, o.ID)
			continue
		}
		used += o.Size
	}
	if used > perSite {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("site %s keeps %d bytes in escrow already", b.Site, used-b.Size))
	}
	return gone, t.AddEscrow(b)
}

// PutEscrow implements the node service.
func (s nodeService) PutEscrow(ctx context.Context, in *connect.ClientStream[musterv1.PutEscrowRequest]) (*musterv1.PutEscrowResponse, error) {
	c, e, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	h, err := firstOf(in.Receive, func() *musterv1.EscrowHeader { return in.Msg().GetHeader() }, in.Err)
	if err != nil {
		return nil, err
	}
	if err := checkAnnounced(h.Sha256, h.Size); err != nil {
		return nil, err
	}
	b := fleet.EscrowBlob{
		Tenant: e.tenant, Site: e.site, ID: fleet.EscrowID([32]byte(h.Sha256)), SHA256: h.Sha256, Size: h.Size, Node: c.id, Kind: h.Kind,
		Stored: s.cfg.Now().UTC(),
	}
	switch {
	case b.Kind != escrow.KindSnapshot && b.Kind != escrow.KindDiskKey:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("kind %.40q is not known", b.Kind))
	case b.Kind == escrow.KindDiskKey && b.Size > escrow.MaxDiskKey:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a sealed disk key has at most %d bytes", escrow.MaxDiskKey))
	}
	var key []byte
	existed := false
	err = s.store.View(ctx, func(t store.Reader) error {
		tenant, err := t.Tenant(e.tenant)
		if err != nil {
			return err
		}
		key = tenant.EscrowKey
		n, err := t.Node(e.tenant, c.id)
		if err != nil {
			return err
		}
		switch {
		case e.site == "" || !n.Admitted():
			return connect.NewError(connect.CodePermissionDenied, errors.New("only nodes of a site put anything into escrow"))
		case b.Kind == escrow.KindSnapshot && !n.MayServe:
			return connect.NewError(connect.CodePermissionDenied, errors.New("only nodes that may be servers of a site put snapshots into escrow"))
		}
		old, err := t.Escrow(e.tenant, b.ID)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err == nil && (old.Site != e.site || old.For != "") {
			return connect.NewError(connect.CodeAlreadyExists, errors.New("this blob is kept for somebody else"))
		}
		existed = err == nil
		return err
	})
	if err != nil {
		return nil, s.unavailable("escrow not taken", c.id, err)
	}
	if _, err := os.Stat(s.vault.path(e.tenant, b.ID)); existed && err == nil {
		return &musterv1.PutEscrowResponse{Id: b.ID, Existed: true}, nil
	}
	leave, err := s.vault.enter(string(c.id), b.ID, s.cfg.Now(), escrowEvery)
	if err != nil {
		return nil, err
	}
	done := false
	defer func() { leave(done) }()
	id, head, err := s.vault.receive(e.tenant, h.Size, h.Sha256, pieces(in.Receive, func() []byte { return in.Msg().GetData() }, in.Err))
	if err != nil {
		return nil, s.unavailable("escrow not taken", c.id, err)
	}
	// The database names the file from here on, or the file goes.
	defer func() {
		if !done {
			s.dropUnnamed(ctx, e.tenant, id)
		}
	}()
	if len(key) == 0 || head.KeyID != escrow.KeyID(key) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the blob is not sealed to the tenant's escrow key: fetch the newest charter"))
	}
	if head.Tenant != e.tenant || head.Site != e.site {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the blob is of another site"))
	}
	if head.Kind != b.Kind || b.Kind == escrow.KindDiskKey && head.Node != c.id {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the blob is of another kind than announced, or the disk key of another node"))
	}
	b.Cluster, b.Epoch, b.Taken, b.KeyID = head.Cluster, head.Epoch, head.Taken.UTC(), head.KeyID
	gone, err := s.keep(ctx, b, existed, nil)
	if err != nil {
		return nil, s.unavailable("escrow not taken", c.id, err)
	}
	done = true
	s.vault.drop(e.tenant, gone)
	return &musterv1.PutEscrowResponse{Id: id}, nil
}

// keep commits the row of a blob. also, if given, runs in the transaction.
func (s *Server) keep(ctx context.Context, b fleet.EscrowBlob, there bool, also func(store.Tx) error) (gone []string, err error) {
	err = s.store.Update(ctx, func(t store.Tx) error {
		gone = nil
		if !there {
			if gone, err = keepBlob(t, b, s.vault.perSite); err != nil {
				return err
			}
			text := fmt.Sprintf("%s of site %s put a snapshot of cluster %s into escrow: %s", fleet.Words(b.Node), b.Site, b.Cluster, b.ID)
			node := b.Node
			if b.Kind == escrow.KindDiskKey {
				text = fmt.Sprintf("%s of site %s put the recovery key of its disk into escrow: %s", fleet.Words(b.Node), b.Site, b.ID)
			}
			if b.For != "" {
				text, node = fmt.Sprintf("a snapshot of cluster %s waits for %s: %s", b.Cluster, fleet.Words(b.For), b.ID), b.For
			}
			if _, err := t.AddEvent(cleanEvent(fleet.Event{Tenant: b.Tenant, Time: s.cfg.Now(), Kind: "escrow.stored", Node: node, Site: b.Site, Text: text})); err != nil {
				return err
			}
		}
		if also != nil {
			if err := also(t); err != nil {
				return err
			}
		}
		failpoint.Hit("escrow.before-commit")
		return nil
	})
	if err == nil {
		failpoint.Hit("escrow.after-commit")
		s.hub.changed(eventsTopic(b.Tenant))
	}
	return gone, err
}

// firstOf wants the header as first message of a stream.
func firstOf[H any](receive func() bool, header func() *H, problem func() error) (*H, error) {
	if !receive() {
		if err := problem(); err != nil {
			return nil, err
		}
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the stream is empty"))
	}
	if h := header(); h != nil {
		return h, nil
	}
	return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the first message is no header"))
}

// pieces reads the data of a stream, piece by piece.
func pieces(receive func() bool, data func() []byte, problem func() error) func() ([]byte, error) {
	return func() ([]byte, error) {
		if !receive() {
			if err := problem(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		b := data()
		if len(b) == 0 {
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("a message without data"))
		}
		return b, nil
	}
}

// GetHandover implements the node service.
func (s nodeService) GetHandover(ctx context.Context, q *musterv1.GetHandoverRequest, out *connect.ServerStream[musterv1.GetHandoverResponse]) error {
	c, e, err := s.caller(ctx)
	if err != nil {
		return err
	}
	var b fleet.EscrowBlob
	err = s.store.View(ctx, func(t store.Reader) error {
		if err := fleet.ValidateEscrowID(q.Id); err != nil {
			return connect.NewError(connect.CodeInvalidArgument, err)
		}
		b, err = t.Escrow(e.tenant, q.Id)
		// What is another node's, this one is not even told of.
		if errors.Is(err, store.ErrNotFound) || err == nil && (b.For != c.id || b.Site != e.site) {
			return connect.NewError(connect.CodeNotFound, errors.New("no such snapshot was handed to you"))
		}
		return err
	})
	if err != nil {
		return s.unavailable("handover not read", c.id, err)
	}
	if err := out.Send(&musterv1.GetHandoverResponse{Part: &musterv1.GetHandoverResponse_Header{Header: &musterv1.EscrowHeader{
		Sha256: b.SHA256, Size: b.Size, Cluster: b.Cluster, Epoch: b.Epoch, Taken: timestamppb.New(b.Taken), KeyId: b.KeyID,
	}}}); err != nil {
		return err
	}
	err = s.vault.send(b, func(p []byte) error {
		return out.Send(&musterv1.GetHandoverResponse{Part: &musterv1.GetHandoverResponse_Data{Data: p}})
	})
	if err != nil {
		return s.unavailable("handover not sent", c.id, err)
	}
	return nil
}

// send reads a blob in pieces.
func (v *vault) send(b fleet.EscrowBlob, to func([]byte) error) error {
	f, err := os.Open(v.path(b.Tenant, b.ID))
	if err != nil {
		return fmt.Errorf("central: read blob: %w", err)
	}
	defer f.Close()
	buf := make([]byte, maxPiece)
	for {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			if err := to(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("central: read blob: %w", err)
		}
	}
}

// ListEscrow implements the management service.
func (s management) ListEscrow(ctx context.Context, q *musterv1.ListEscrowRequest) (*musterv1.ListEscrowResponse, error) {
	c := callerOf(ctx)
	out := &musterv1.ListEscrowResponse{}
	err := s.store.View(ctx, func(t store.Reader) (err error) {
		if out.Lab, err = labOf(t, c.Tenant); err != nil {
			return err
		}
		look := c.part(t)
		var blobs []fleet.EscrowBlob
		if q.Site != "" {
			if _, err := look.findSite(q.Site); err != nil {
				return err
			}
			blobs, err = t.EscrowOfSite(c.Tenant, q.Site, maxList)
		} else {
			blobs, err = page(look, access.Escrow, maxList, func(after *fleet.EscrowBlob, count int) ([]fleet.EscrowBlob, error) {
				if after == nil {
					return t.EscrowAfter(c.Tenant, "", count)
				}
				return t.EscrowAfter(c.Tenant, after.ID, count)
			}, func(b fleet.EscrowBlob) string { return b.Site })
			slices.SortStableFunc(blobs, func(a, b fleet.EscrowBlob) int { return b.Stored.Compare(a.Stored) })
		}
		for _, b := range blobs {
			out.Blobs = append(out.Blobs, api.EscrowBlobToProto(b))
		}
		return err
	})
	return out, s.coded(ctx, "listing escrow", err)
}

func noSnapshot(tenant, id string) error {
	return &errNoSuch{fmt.Sprintf("there is no sealed snapshot %.80q in tenant %s", id, tenant), "`muster escrow list` lists them"}
}

// FetchEscrow implements the management service.
func (s management) FetchEscrow(ctx context.Context, q *musterv1.FetchEscrowRequest, out *connect.ServerStream[musterv1.FetchEscrowResponse]) error {
	c := callerOf(ctx)
	var b fleet.EscrowBlob
	err := s.store.Update(ctx, func(t store.Tx) (err error) {
		if b, err = t.Escrow(c.Tenant, q.Id); errors.Is(err, store.ErrNotFound) {
			return noSnapshot(c.Tenant, q.Id)
		} else if err != nil {
			return err
		}
		look := c.part(t)
		if sees, err := look.sees(access.Escrow, b.Site); err != nil || !sees {
			return cmp.Or(err, noSnapshot(c.Tenant, q.Id))
		}
		if err := look.may(access.Escrow, access.Change, b.Site); err != nil {
			return err
		}
		by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
		return by.record(t, c.Tenant, audit.EscrowFetched, "escrow/"+b.ID, nil, map[string]any{"site": b.Site, "cluster": b.Cluster, "kind": b.Kind, "node": b.Node}, "")
	})
	if err != nil {
		return s.coded(ctx, "fetching from escrow", err)
	}
	if err := out.Send(&musterv1.FetchEscrowResponse{Part: &musterv1.FetchEscrowResponse_Blob{Blob: api.EscrowBlobToProto(b)}}); err != nil {
		return err
	}
	return s.coded(ctx, "fetching from escrow", s.vault.send(b, func(p []byte) error {
		return out.Send(&musterv1.FetchEscrowResponse{Part: &musterv1.FetchEscrowResponse_Data{Data: p}})
	}))
}

// PutHandover implements the management service.
func (s management) PutHandover(ctx context.Context, in *connect.ClientStream[musterv1.PutHandoverRequest]) (*musterv1.PutHandoverResponse, error) {
	c := callerOf(ctx)
	h, err := firstOf(in.Receive, func() *musterv1.HandoverHeader { return in.Msg().GetHeader() }, in.Err)
	if err != nil {
		return nil, err
	}
	if err := checkAnnounced(h.Sha256, h.Size); err != nil {
		return nil, err
	}
	reason, err := reasonOf(h.Reason, true)
	if err != nil {
		return nil, err
	}
	var n fleet.Node
	existed := false
	b := fleet.EscrowBlob{Tenant: c.Tenant, ID: fleet.EscrowID([32]byte(h.Sha256)), SHA256: h.Sha256, Size: h.Size, Stored: s.cfg.Now().UTC()}
	err = s.store.View(ctx, func(t store.Reader) error {
		look := c.part(t)
		if n, err = look.findNode(h.Node); err != nil {
			return err
		}
		if err := look.may(access.Escrow, access.Change, n.Site); err != nil {
			return err
		}
		if !n.Admitted() {
			return &enroll.Refused{Why: fmt.Sprintf("node %s belongs to no site", n.ID)}
		}
		r, err := t.Report(c.Tenant, n.ID)
		if errors.Is(err, store.ErrNotFound) || err == nil && !bytes.Equal(r.Offer, h.Key) {
			return &enroll.Refused{Why: fmt.Sprintf("node %s offers another key now", n.ID), Do: "seal it again: the key lives as long as the node's agent"}
		}
		if err != nil {
			return err
		}
		old, err := t.Escrow(c.Tenant, b.ID)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err == nil && (old.Site != n.Site || old.For != n.ID) {
			return connect.NewError(connect.CodeAlreadyExists, errors.New("this blob is kept for somebody else"))
		}
		existed = err == nil
		return err
	})
	if err != nil {
		return nil, s.coded(ctx, "handing over", err)
	}
	leave, err := s.vault.enter(c.actor(), b.ID, s.cfg.Now(), 0)
	if err != nil {
		return nil, err
	}
	done := false
	defer func() { leave(done) }()
	id, head, err := s.vault.receive(c.Tenant, h.Size, h.Sha256, pieces(in.Receive, func() []byte { return in.Msg().GetData() }, in.Err))
	if err != nil {
		return nil, s.coded(ctx, "handing over", err)
	}
	defer func() {
		if !done {
			s.dropUnnamed(ctx, c.Tenant, id)
		}
	}()
	if head.Kind != escrow.KindSnapshot {
		return nil, s.coded(ctx, "handing over", &enroll.Refused{Why: "only snapshots are handed over", Do: "open a disk key with muster escrow open --out, and type it at the box"})
	}
	if head.Tenant != c.Tenant || head.Site != n.Site || head.KeyID != escrow.KeyID(h.Key) {
		return nil, s.coded(ctx, "handing over", &enroll.Refused{Why: "the snapshot is of another site or sealed to another key"})
	}
	b.Site, b.For, b.Cluster, b.Epoch, b.Taken, b.KeyID = n.Site, n.ID, head.Cluster, head.Epoch, head.Taken.UTC(), head.KeyID
	by := act{actor: c.actor(), source: c.source, now: s.cfg.Now()}
	gone, err := s.keep(ctx, b, existed, func(t store.Tx) error {
		return by.record(t, c.Tenant, audit.EscrowHandedOver, "escrow/"+b.ID, nil, b, reason)
	})
	if err != nil {
		return nil, s.coded(ctx, "handing over", err)
	}
	done = true
	s.vault.drop(c.Tenant, gone)
	return &musterv1.PutHandoverResponse{Blob: api.EscrowBlobToProto(b)}, nil
}
