package peer

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"connectrpc.com/connect"
	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/internal/flush"
)

// store keeps sealed blobs of peers: a file for each, named by its digest, and
// beside it what it is. A blob counts once both are flushed.
type store struct {
	dir    string
	limits Limits

	mu    sync.Mutex
	blobs []keptBlob // oldest first
	// coming are the bytes of blobs on their way in, by owner: one each.
	coming map[fleet.NodeID]int64
	next   uint64
}

type keptBlob struct {
	SHA256 fleet.HexBytes `json:"sha256"`
	Size   int64          `json:"size"`
	Name   string         `json:"name,omitempty"`
	Owner  fleet.NodeID   `json:"owner"`
	UID    string         `json:"uid,omitempty"`
	Epoch  uint64         `json:"epoch,omitempty"`
	Kind   string         `json:"kind,omitempty"`
	// N grows with each blob that is taken in.
	N uint64 `json:"n"`
}

func (k keptBlob) blob() Blob {
	return Blob{SHA256: papers.Ref(k.SHA256), Size: k.Size, Name: k.Name, Owner: k.Owner, UID: k.UID, Epoch: k.Epoch, Kind: k.Kind}
}

const (
	blobSuffix = ".blob"
	metaSuffix = ".json"
	maxMeta    = 4 << 10
	// spare is what must stay free on the disk: the node needs it more.
	spare = 1 << 30
)

var (
	errFull    = errors.New("there is no room for it")
	errTooBig  = errors.New("it is larger than what is kept")
	errComing  = errors.New("another blob of this node is on its way")
	errCorrupt = errors.New("its bytes are not what its digest says")
)

// openStore reads what is kept, and removes what was not finished.
func openStore(dir string, limits Limits) (*store, error) {
	s := &store{dir: dir, limits: limits, coming: map[fleet.NodeID]int64{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("peer: open escrow: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("peer: open escrow: %w", err)
	}
	keep := map[string]bool{}
	for _, e := range entries {
		name, isMeta := strings.CutSuffix(e.Name(), metaSuffix)
		if !isMeta || !e.Type().IsRegular() {
			continue
		}
		k, err := readMeta(filepath.Join(dir, e.Name()))
		if err != nil || k.SHA256.String() != name {
			continue
		}
		if fi, err := os.Lstat(filepath.Join(dir, name+blobSuffix)); err != nil || !fi.Mode().IsRegular() || fi.Size() != k.Size {
			continue
		}
		keep[e.Name()], keep[name+blobSuffix] = true, true
		s.blobs = append(s.blobs, k)
		s.next = max(s.next, k.N+1)
	}
	slices.SortFunc(s.blobs, func(a, b keptBlob) int { return int(min(max(int64(a.N)-int64(b.N), -1), 1)) })
	for _, e := range entries {
		if !keep[e.Name()] && e.Type().IsRegular() {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("peer: tidy escrow: %w", err)
			}
		}
	}
	return s, nil
}

func readMeta(name string) (k keptBlob, err error) {
	f, err := os.Open(name)
	if err != nil {
		return k, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b, err := io.ReadAll(io.LimitReader(f, maxMeta))
	if err != nil {
		return k, err
	}
	if err := json.Unmarshal(b, &k); err != nil {
		return k, err
	}
	if len(k.SHA256) != sha256.Size || k.Size <= 0 {
		return k, errCorrupt
	}
	return k, nil
}

func (s *store) path(ref papers.Ref, suffix string) string {
	return filepath.Join(s.dir, hex.EncodeToString(ref[:])+suffix)
}

// find returns what is kept under ref.
func (s *store) find(ref papers.Ref) (Blob, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.blobs {
		if papers.Ref(k.SHA256) == ref {
			return k.blob(), true
		}
	}
	return Blob{}, false
}

func (s *store) list() (out []Blob) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.blobs {
		out = append(out, k.blob())
	}
	return out
}

// reserve makes sure that there is room for one more blob of an owner.
func (s *store) reserve(b Blob) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.Size > s.limits.EscrowSize {
		return errTooBig
	}
	if s.coming[b.Owner] != 0 {
		return errComing
	}
	total := b.Size
	for _, k := range s.blobs {
		total += k.Size
	}
	for _, n := range s.coming {
		total += n
	}
	// What this blob will push out counts until it is here: it must not be
	// lost before the new one is safe.
	if total > s.limits.EscrowTotal {
		return errFull
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &fs); err != nil {
		return fmt.Errorf("peer: room for escrow: %w", err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < uint64(b.Size)+spare {
		return errFull
	}
	s.coming[b.Owner] = b.Size
	return nil
}

func (s *store) release(owner fleet.NodeID) {
	s.mu.Lock()
	delete(s.coming, owner)
	s.mu.Unlock()
}

// incoming is a blob on its way in.
type incoming struct {
	s    *store
	b    Blob
	f    *renameio.PendingFile
	w    *bufio.Writer
	h    hash.Hash
	left int64
}

// begin takes b in; the caller ends it with commit or drop.
func (s *store) begin(b Blob) (*incoming, error) {
	if err := s.reserve(b); err != nil {
		return nil, err
	}
	f, err := renameio.NewPendingFile(s.path(b.SHA256, blobSuffix), renameio.WithTempDir(s.dir), renameio.WithPermissions(0o600))
	if err != nil {
		s.release(b.Owner)
		return nil, fmt.Errorf("peer: keep blob: %w", err)
	}
	return &incoming{s: s, b: b, f: f, w: bufio.NewWriterSize(f, 64<<10), h: sha256.New(), left: b.Size}, nil
}

func (i *incoming) write(p []byte) error {
	if i.left -= int64(len(p)); i.left < 0 {
		return errCorrupt
	}
	i.h.Write(p)
	if _, err := i.w.Write(p); err != nil {
		return fmt.Errorf("peer: keep blob: %w", err)
	}
	return nil
}

// drop forgets the blob unless it was committed.
func (i *incoming) drop() {
	_ = i.f.Cleanup()
	i.s.release(i.b.Owner)
}

// commit flushes the blob, then what it is; then the owner's oldest goes.
func (i *incoming) commit() error {
	if i.left != 0 || papers.Ref(i.h.Sum(nil)) != i.b.SHA256 {
		return errCorrupt
	}
	if err := i.w.Flush(); err != nil {
		return fmt.Errorf("peer: keep blob: %w", err)
	}
	if err := i.f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("peer: keep blob: %w", err)
	}
	failpoint.Hit("escrow/after-blob")
	return i.s.note(i.b)
}

func (s *store) note(b Blob) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := keptBlob{SHA256: slices.Clone(b.SHA256[:]), Size: b.Size, Name: b.Name, Owner: b.Owner, UID: b.UID, Epoch: b.Epoch, Kind: b.Kind, N: s.next}
	meta, err := json.Marshal(k)
	if err != nil {
		return fmt.Errorf("peer: keep blob: %w", err)
	}
	if err := renameio.WriteFile(s.path(b.SHA256, metaSuffix), meta, 0o600, renameio.WithTempDir(s.dir)); err != nil {
		return fmt.Errorf("peer: keep blob: %w", err)
	}
	if err := syncDir(s.dir); err != nil {
		return err
	}
	failpoint.Hit("escrow/after-meta")
	s.next++
	s.blobs = append(s.blobs, k)
	var own []keptBlob
	for _, x := range s.blobs {
		if x.Owner == b.Owner && x.Kind == b.Kind {
			own = append(own, x)
		}
	}
	limit := s.limits.EscrowBlobs
	if b.Kind == escrow.KindDiskKey {
		limit = 1
	}
	for _, old := range own[:max(0, len(own)-limit)] {
		ref := papers.Ref(old.SHA256)
		failpoint.Hit("escrow/before-remove")
		// The description goes first: a blob without one is nothing.
		if err := errors.Join(os.Remove(s.path(ref, metaSuffix)), os.Remove(s.path(ref, blobSuffix))); err != nil {
			return fmt.Errorf("peer: remove old blob: %w", err)
		}
		s.blobs = slices.DeleteFunc(s.blobs, func(x keptBlob) bool { return papers.Ref(x.SHA256) == ref })
	}
	return nil
}

func syncDir(dir string) error {
	if err := flush.Dir(dir); err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	return nil
}

// notKept is the answer when a blob is not wanted or not here.
func notKept(err error) error { return connect.NewError(connect.CodeNotFound, err) }

// KeepEscrow implements the RPC.
func (s service) KeepEscrow(ctx context.Context, stream *connect.ClientStream[peerv1.KeepEscrowRequest]) (*peerv1.KeepEscrowResponse, error) {
	p, l := s.p, linkOf(ctx)
	node, _ := l.greeted()
	if p.escrow == nil {
		return nil, notKept(errors.New("this node keeps no blobs"))
	}
	if !stream.Receive() {
		return nil, bad(errors.Join(errors.New("there is no header"), stream.Err()))
	}
	b, err := blobFromProto(stream.Msg().GetHeader())
	if err != nil {
		return nil, bad(err)
	}
	b.Owner = node
	if _, ok := p.escrow.find(b.SHA256); ok {
		return &peerv1.KeepEscrowResponse{}, nil
	}
	in, err := p.escrow.begin(b)
	switch {
	case errors.Is(err, errFull) || errors.Is(err, errTooBig) || errors.Is(err, errComing):
		return nil, notKept(err)
	case err != nil:
		return nil, s.fault(ctx, "keep escrow", err)
	}
	defer in.drop()
	for p.extend(l); stream.Receive(); p.extend(l) {
		data := stream.Msg().GetData()
		if len(data) == 0 || len(data) > maxChunk || stream.Msg().GetHeader() != nil {
			return nil, bad(errors.New("a chunk is empty or too long"))
		}
		if err := in.write(data); errors.Is(err, errCorrupt) {
			return nil, bad(err)
		} else if err != nil {
			return nil, s.fault(ctx, "keep escrow", err)
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	if err := in.commit(); errors.Is(err, errCorrupt) {
		return nil, bad(err)
	} else if err != nil {
		return nil, s.fault(ctx, "keep escrow", err)
	}
	p.cfg.Log.Info("blob kept", slog.String(keyNode, string(node)), slog.String(keyBlob, b.SHA256.String()))
	return &peerv1.KeepEscrowResponse{}, nil
}

// GetEscrow implements the RPC. Blobs are sealed to the operator's key, so
// that any admitted node may carry them.
func (s service) GetEscrow(ctx context.Context, m *peerv1.GetEscrowRequest, stream *connect.ServerStream[peerv1.GetEscrowResponse]) (err error) {
	p, l := s.p, linkOf(ctx)
	if len(m.GetSha256()) != sha256.Size {
		return bad(errors.New("want a digest of 32 bytes"))
	}
	if p.escrow == nil {
		return notKept(errors.New("this node keeps no blobs"))
	}
	b, ok := p.escrow.find(papers.Ref(m.GetSha256()))
	if !ok {
		return notKept(errors.New("it is not here"))
	}
	f, err := os.Open(p.escrow.path(b.SHA256, blobSuffix))
	if err != nil {
		return notKept(errors.New("it is not here any more"))
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for chunk := make([]byte, maxChunk); ; {
		n, err := io.ReadFull(f, chunk)
		if n > 0 {
			p.extend(l)
			if err := stream.Send(&peerv1.GetEscrowResponse{Data: chunk[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return s.fault(ctx, "get escrow", fmt.Errorf("peer: read blob: %w", err))
		}
	}
}

// ListEscrow implements the RPC.
func (s service) ListEscrow(context.Context, *peerv1.ListEscrowRequest) (*peerv1.ListEscrowResponse, error) {
	out := &peerv1.ListEscrowResponse{}
	if s.p.escrow == nil {
		return out, nil
	}
	list := s.p.escrow.list()
	for _, b := range list[max(0, len(list)-maxBlobs):] {
		out.Blobs = append(out.Blobs, blobToProto(b))
	}
	return out, nil
}
