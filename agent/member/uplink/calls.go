package uplink

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent/member"
	"github.com/muster-edge/muster/agent/peer"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// chunk is the size of one message of a stream.
const chunk = 256 << 10

// AskFounding implements member.Centre.
func (u *Uplink) AskFounding(ctx context.Context, site, uid string) (member.Grant, error) {
	rpc, at, err := u.rpc()
	if err != nil {
		return member.Grant{}, err
	}
	defer u.hangUp()
	a, err := rpc.AskFounding(ctx, &musterv1.AskFoundingRequest{Site: site, Uid: uid})
	if err = u.answered(at, err); err != nil {
		return member.Grant{}, fmt.Errorf("uplink: ask for the founding right: %w", err)
	}
	g := member.Grant{Node: fleet.NodeID(a.GetNode()), UID: a.GetUid(), Unsure: a.GetUnsure()}
	if g.Node != "" {
		if err := g.Node.Validate(); err != nil {
			return member.Grant{}, fmt.Errorf("uplink: ask for the founding right: %w", err)
		}
	}
	return g, nil
}

// PutEscrow implements member.Centre.
func (u *Uplink) PutEscrow(ctx context.Context, b peer.Blob, taken time.Time, keyID string, data io.Reader) error {
	rpc, at, err := u.rpc()
	if err != nil {
		return err
	}
	defer u.hangUp()
	s, err := rpc.PutEscrow(ctx)
	if err != nil {
		return fmt.Errorf("uplink: put escrow: %w", u.answered(at, err))
	}
	err = s.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Header{Header: &musterv1.EscrowHeader{
		Sha256: b.SHA256[:], Size: b.Size, Cluster: b.UID, Epoch: b.Epoch, Taken: timestamppb.New(taken), KeyId: keyID, Kind: b.Kind,
	}}})
	buf := make([]byte, chunk)
	for err == nil {
		n, rerr := io.ReadFull(data, buf)
		if n > 0 {
			err = s.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Data{Data: buf[:n]}})
		}
		if errors.Is(rerr, io.EOF) || errors.Is(rerr, io.ErrUnexpectedEOF) {
			break
		}
		if rerr != nil {
			// Ending the stream here makes the centre refuse the short blob.
			_, _ = s.CloseAndReceive()
			return fmt.Errorf("uplink: put escrow: %w", rerr)
		}
	}
	// After a failed Send the answer has the reason.
	if _, err := s.CloseAndReceive(); err != nil {
		return fmt.Errorf("uplink: put escrow: %w", u.answered(at, err))
	}
	return u.answered(at, nil)
}

func random16() []byte {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // crypto/rand never fails: it ends the program instead
	return b
}

var _ member.Centre = (*Uplink)(nil)
