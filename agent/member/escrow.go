package member

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/agent/peer"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

const (
	// hourly is the planner's word for a snapshot that no plan wants.
	hourly = "hourly"
	// firstEscrow is when the first copy of a run is due; retryEscrow when one
	// that failed is tried again.
	firstEscrow = 2 * time.Minute
	retryEscrow = 10 * time.Minute
	// escrowCopies is how many peers get a copy.
	escrowCopies = 2
	// uploadLimit bounds the way to the centre.
	uploadLimit = 30 * time.Minute
	sealedFile  = "snapshot.sealed"
)

// sealed is a sealed snapshot on the disk of this node, on its way elsewhere.
type sealed struct {
	blob  peer.Blob
	path  string
	taken time.Time
	keyID string
}

// escrowDue reports whether a copy of the datastore should go elsewhere. The
// caller holds mu.
func (m *Member) escrowDue(docs cb.Documents) bool {
	if docs.Charter == nil || len(docs.Charter.EscrowKey) == 0 || m.k3s.Process != cb.ProcessServer || !m.k3s.API {
		return false
	}
	return m.mono() >= cmp.Or(m.escrowAt, firstEscrow)
}

// takeSnapshot takes a snapshot and, if the charter has an escrow key, puts a
// sealed copy elsewhere before it succeeds.
func (m *Member) takeSnapshot(ctx context.Context, plan string) (err error) {
	name := plan
	if plan == hourly {
		// k3s keeps one snapshot for each name.
		name = fmt.Sprintf("%s-%x", hourly, m.cfg.Clock.Now().Unix())
		defer func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			next := m.cfg.EscrowEvery
			if err != nil {
				next = min(next, retryEscrow)
			}
			m.escrowAt = m.mono() + next
		}()
	}
	docs := m.cfg.Papers.Documents()
	rec := m.cfg.Journal.Disk().Record
	if docs.Charter == nil || rec == nil {
		return errors.New("member: take snapshot: this node is in no cluster")
	}
	m.k3sMu.Lock()
	snap, err := m.cfg.K3s.Snapshot(ctx, name)
	var server, agent string
	if err == nil {
		server, agent, err = m.cfg.K3s.EscrowToken()
	}
	m.k3sMu.Unlock()
	if err != nil {
		return fmt.Errorf("member: take snapshot: %w", err)
	}
	if len(docs.Charter.EscrowKey) > 0 {
		if err := m.copyElsewhere(ctx, docs, *rec, snap, server+"\n"+agent); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.snapshot = plan
	if plan != hourly {
		m.escrowAt = m.mono() + m.cfg.EscrowEvery
	}
	return nil
}

// copyElsewhere seals a snapshot and gives it to peers; the centre gets it
// beside the loop. With no peer to be heard the centre must have it first.
func (m *Member) copyElsewhere(ctx context.Context, docs cb.Documents, rec cb.Record, snap k3s.Snapshot, token string) error {
	x, err := m.seal(docs, rec, snap, token)
	if err != nil {
		return fmt.Errorf("member: seal snapshot: %w", err)
	}
	kept, errs := 0, []error(nil)
	for _, id := range m.keepers() {
		if kept == escrowCopies {
			break
		}
		if err := m.giveTo(ctx, id, x); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", fleet.Words(id), err))
			continue
		}
		kept++
	}
	if kept > 0 {
		m.upload(x)
		return nil
	}
	if m.cfg.Centre == nil {
		return fmt.Errorf("member: keep snapshot elsewhere: %w", errors.Join(append(errs, errors.New("nobody is there to keep it"))...))
	}
	if err := m.give(ctx, x); err != nil {
		return fmt.Errorf("member: keep snapshot elsewhere: %w", errors.Join(append(errs, err)...))
	}
	return nil
}

// keepers are peers to give a copy to: those that are heard, servers last,
// since what destroys the servers should not destroy the copies.
func (m *Member) keepers() []fleet.NodeID {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []fleet.NodeID
	for id, h := range m.peers {
		if m.mono()-h.at <= m.cfg.Policy.PeerFresh {
			out = append(out, id)
		}
	}
	slices.SortFunc(out, func(a, b fleet.NodeID) int {
		return cmp.Or(cmp.Compare(m.peers[a].st.Role, m.peers[b].st.Role), cmp.Compare(a, b))
	})
	return out
}

// seal writes the sealed snapshot to the disk; the plain one never leaves
// k3s' directory, and the token is in no file of ours.
func (m *Member) seal(docs cb.Documents, rec cb.Record, snap k3s.Snapshot, token string) (sealed, error) {
	in, err := os.Open(snap.Path)
	if err != nil {
		return sealed{}, err
	}
	defer in.Close()
	plain := sha256.New()
	size, err := io.Copy(plain, in)
	if err == nil {
		_, err = in.Seek(0, io.SeekStart)
	}
	if err != nil {
		return sealed{}, err
	}
	m.mu.Lock()
	version := m.k3s.Version
	m.mu.Unlock()
	taken := m.cfg.Clock.Now().UTC()
	h := escrow.Header{Tenant: docs.Charter.Tenant, Site: docs.Charter.Site, Node: m.cfg.Self, Cluster: rec.UID, Epoch: rec.Epoch, Taken: taken}
	c := escrow.Contents{Name: filepath.Base(snap.Name), Size: size, SHA256: hex.EncodeToString(plain.Sum(nil)), Token: token, K3s: version}
	path := filepath.Join(m.cfg.StateDir, sealedFile)
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600), renameio.WithTempDir(m.cfg.StateDir))
	if err != nil {
		return sealed{}, err
	}
	defer f.Cleanup() //nolint:errcheck // a leftover is replaced by the next one
	sum := sha256.New()
	n, err := escrow.SealSnapshot(io.MultiWriter(f, sum), docs.Charter.EscrowKey, h, c, in)
	if err != nil {
		return sealed{}, err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return sealed{}, err
	}
	b := peer.Blob{Size: n, Name: c.Name, UID: rec.UID, Epoch: rec.Epoch, SHA256: papers.Ref(sum.Sum(nil))}
	return sealed{blob: b, path: path, taken: taken, keyID: escrow.KeyID(docs.Charter.EscrowKey)}, nil
}

// EscrowDiskKey gives the sealed recovery key of this node's disk to the centre
// and to one peer. Both may have it already. centre and peer say who
// acknowledged it now; err says why one did not.
func (m *Member) EscrowDiskKey(ctx context.Context, blob []byte) (centre, kept bool, err error) {
	h, err := escrow.Inspect(bytes.NewReader(blob))
	if err != nil {
		return false, false, fmt.Errorf("member: keep disk key elsewhere: %w", err)
	}
	if h.Kind != escrow.KindDiskKey || h.Node != m.cfg.Self || len(blob) > escrow.MaxDiskKey {
		return false, false, errors.New("member: keep disk key elsewhere: it is not the key of this node's disk")
	}
	b := peer.Blob{Kind: escrow.KindDiskKey, Size: int64(len(blob)), Name: escrow.KindDiskKey, SHA256: sha256.Sum256(blob)}
	var errs []error
	for _, id := range m.keepers() {
		if err := m.handTo(ctx, id, b, bytes.NewReader(blob)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", fleet.Words(id), err))
			continue
		}
		kept, errs = true, nil
		break
	}
	if !kept && len(errs) == 0 {
		errs = append(errs, errors.New("no peer is heard"))
	}
	if m.cfg.Centre == nil {
		errs = append(errs, errors.New("there is no centre"))
	} else if err := m.cfg.Centre.PutEscrow(ctx, b, h.Taken, h.KeyID, bytes.NewReader(blob)); err != nil {
		errs = append(errs, fmt.Errorf("centre: %w", err))
	} else {
		centre = true
	}
	if err := errors.Join(errs...); err != nil {
		return centre, kept, fmt.Errorf("member: keep disk key elsewhere: %w", err)
	}
	return centre, kept, nil
}

// giveTo gives the blob to a peer, over a connection of its own: it takes long.
func (m *Member) giveTo(ctx context.Context, id fleet.NodeID, x sealed) error {
	f, err := os.Open(x.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return m.handTo(ctx, id, x.blob, f)
}

func (m *Member) handTo(ctx context.Context, id fleet.NodeID, b peer.Blob, from io.Reader) error {
	var errs []error
	for _, at := range m.addressesOf(id) {
		conn, g, err := m.greet(ctx, at)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if g.Node == id {
			err = conn.KeepEscrow(ctx, b, from)
		} else {
			err = fmt.Errorf("another node answers at %s", at)
		}
		_ = conn.Close()
		return err
	}
	return errors.Join(append(errs, errors.New("it cannot be reached"))...)
}

// upload gives the blob to the centre beside the loop. If that fails, the next
// snapshot goes there.
func (m *Member) upload(x sealed) {
	if m.cfg.Centre == nil {
		return
	}
	m.job(cb.TakeSnapshot, uploadLimit, func(ctx context.Context) error { return m.give(ctx, x) })
}

func (m *Member) give(ctx context.Context, x sealed) error {
	f, err := os.Open(x.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return m.cfg.Centre.PutEscrow(ctx, x.blob, x.taken, x.keyID, f)
}

// restore goes on from a snapshot: one that an operator sealed for this node
// at the centre (its name begins with "e-"), or one of this node's own disk.
func (m *Member) restore(ctx context.Context, a cb.Action) error {
	if a.Reset == nil || a.Reset.Snapshot == "" {
		return errors.New("member: restore: no snapshot is named")
	}
	s, err := m.settings()
	if err != nil {
		return err
	}
	x, err := m.fetch(ctx, a.Reset.Snapshot)
	if err != nil {
		return fmt.Errorf("member: restore: %w", err)
	}
	if x.temporary {
		defer os.Remove(x.File) //nolint:errcheck // it is readable by root only
	}
	m.k3sMu.Lock()
	defer m.k3sMu.Unlock()
	if err := m.cfg.K3s.Restore(ctx, s, x.File, x.ServerToken, x.AgentToken); err != nil {
		return fmt.Errorf("member: restore: %w", err)
	}
	return nil
}

type fetched struct {
	Restored
	temporary bool
}

func (m *Member) fetch(ctx context.Context, name string) (fetched, error) {
	if strings.HasPrefix(name, "e-") {
		if m.cfg.Centre == nil {
			return fetched{}, errors.New("the snapshot is at the centre, and this site has none")
		}
		x, err := m.cfg.Centre.Handover(ctx, name, m.cfg.StateDir)
		return fetched{x, true}, err
	}
	if filepath.Base(name) != name || m.cfg.Snapshots == "" {
		return fetched{}, fmt.Errorf("%.80q is no name of a snapshot", name)
	}
	path := filepath.Join(m.cfg.Snapshots, name)
	if _, err := os.Stat(path); err != nil {
		return fetched{}, err
	}
	m.k3sMu.Lock()
	server, agent, err := m.cfg.K3s.EscrowToken()
	m.k3sMu.Unlock()
	return fetched{Restored{File: path, ServerToken: server, AgentToken: agent}, false}, err
}
