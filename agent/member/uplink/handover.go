package uplink

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/agent/member"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
	"github.com/muster-edge/muster/fleet/statement"
)

// A handover: an operator opens a sealed snapshot and seals it to a key that
// this agent drew. The private half is in memory only and ends with the
// agent, so that what was handed over is of no use to who finds it later.

// Offer is the signed envelope that names the agent's key for tenant and site;
// nil if it could not be made. It is made once for each site.
func (u *Uplink) Offer(tenant, site string) []byte {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.offerFor == tenant+"/"+site {
		return u.offer
	}
	if u.cfg.Signer == nil {
		return nil
	}
	if u.private == nil {
		private, public, err := escrow.GenerateKey()
		if err != nil {
			u.log.Warn("no key to hand snapshots over to", "err", err)
			return nil
		}
		u.private, u.public = private, public
	}
	o := fleet.EscrowOffer{Format: fleet.EscrowOfferFormat, Tenant: tenant, Site: site, Node: u.cfg.Node, Key: u.public, Issued: u.cfg.Now().UTC()}
	b, err := json.Marshal(o)
	if err == nil {
		var e statement.Envelope
		if e, err = statement.Sign(fleet.EscrowOfferPayload, b, u.cfg.Signer); err == nil {
			u.offer, u.offerFor = e.JSON(), tenant+"/"+site
		}
	}
	if err != nil {
		u.log.Warn("no key to hand snapshots over to", "err", err)
		return nil
	}
	return u.offer
}

// Handover implements member.Centre.
func (u *Uplink) Handover(ctx context.Context, id, dir string) (member.Restored, error) {
	u.mu.Lock()
	private := u.private
	u.mu.Unlock()
	if private == nil {
		return member.Restored{}, errors.New("uplink: hand over: this agent has offered no key yet")
	}
	rpc, at, err := u.rpc()
	if err != nil {
		return member.Restored{}, err
	}
	defer u.hangUp()
	s, err := rpc.GetHandover(ctx, &musterv1.GetHandoverRequest{Id: id})
	if err != nil {
		return member.Restored{}, fmt.Errorf("uplink: hand over %s: %w", id, u.answered(at, err))
	}
	r := &handed{receive: func() (*musterv1.GetHandoverResponse, error) {
		if !s.Receive() {
			if err := s.Err(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		return s.Msg(), nil
	}, sum: sha256.New()}
	defer s.Close() //nolint:errcheck // what counts was read
	path := filepath.Join(dir, "handover.db")
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600), renameio.WithTempDir(dir))
	if err != nil {
		return member.Restored{}, fmt.Errorf("uplink: hand over: %w", err)
	}
	defer f.Cleanup() //nolint:errcheck // a leftover is replaced by the next one
	_, c, err := escrow.OpenSnapshot(f, r, private)
	if err == nil {
		err = r.complete()
	}
	if errors.Is(err, escrow.ErrWrongKey) {
		err = fmt.Errorf("%w: this agent was started again since; the snapshot has to be handed over once more", err)
	}
	if err != nil {
		return member.Restored{}, fmt.Errorf("uplink: hand over %s: %w", id, err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return member.Restored{}, fmt.Errorf("uplink: hand over: %w", err)
	}
	server, agent, ok := strings.Cut(c.Token, "\n")
	if !ok {
		return member.Restored{}, errors.New("uplink: hand over: the agent token is missing")
	}
	return member.Restored{File: path, ServerToken: server, AgentToken: agent}, u.answered(at, nil)
}

// handed reads a stream: a header, then data.
type handed struct {
	receive func() (*musterv1.GetHandoverResponse, error)
	header  *musterv1.EscrowHeader
	rest    []byte
	sum     hash.Hash
	size    int64
	ended   bool
}

// Read implements io.Reader.
func (h *handed) Read(p []byte) (int, error) {
	for len(h.rest) == 0 {
		if h.ended {
			return 0, io.EOF
		}
		m, err := h.receive()
		if errors.Is(err, io.EOF) {
			h.ended = true
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		if x := m.GetHeader(); x != nil {
			if h.header != nil {
				return 0, errors.New("a second header")
			}
			h.header = x
			continue
		}
		h.rest = m.GetData()
		h.sum.Write(h.rest)
		if h.size += int64(len(h.rest)); h.size > escrow.MaxBlob {
			return 0, errors.New("it is too large")
		}
	}
	n := copy(p, h.rest)
	h.rest = h.rest[n:]
	return n, nil
}

// complete reads what is left and compares it with the header.
func (h *handed) complete() error {
	if _, err := io.Copy(io.Discard, h); err != nil {
		return err
	}
	if h.header == nil || h.size != h.header.GetSize() || string(h.sum.Sum(nil)) != string(h.header.GetSha256()) {
		return errors.New("it is not what the centre announced")
	}
	return nil
}
