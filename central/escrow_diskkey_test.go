package central

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

// diskKey is the sealed recovery key of a node's disk.
func (s *vaultShop) diskKey(of fleet.NodeID, key string) []byte {
	s.t.Helper()
	var b bytes.Buffer
	_, err := escrow.Seal(&b, strings.NewReader(key), s.public, escrow.Header{Kind: escrow.KindDiskKey, Tenant: DefaultTenant, Site: "shop-7", Node: of,
		Taken: s.clock.now().UTC().Truncate(time.Second)})
	s.must(err)
	return b.Bytes()
}

func asDiskKey(h *musterv1.EscrowHeader) { h.Kind = escrow.KindDiskKey }

func TestDiskKeysAreKeptBesideSnapshots(t *testing.T) {
	s := newVaultShop(t)
	a, b := s.join("a", "shop-7"), s.join("b", "shop-7")
	blob := s.diskKey(a.ID, "abcd-efgh\n")
	out, err := s.put(a, blob, asDiskKey)
	s.must(err)
	if again, err := s.put(a, blob, asDiskKey); err != nil || !again.Existed {
		t.Errorf("%v, %v", again, err)
	}
	for i := range escrowPerNode + 2 {
		s.later()
		_, err := s.put(a, s.sealed(a, "shop-7", strings.Repeat("x", i+1), s.public), nil)
		s.must(err)
	}
	if files := s.files(); len(files) != escrowPerNode+1 || !contains(files, out.Id) {
		t.Errorf("snapshots pushed the disk key out: %v", files)
	}
	for range diskKeysPerNode {
		s.later()
		_, err := s.put(a, s.diskKey(a.ID, "newer\n"), asDiskKey)
		s.must(err)
	}
	if files := s.files(); len(files) != escrowPerNode+diskKeysPerNode || contains(files, out.Id) {
		t.Errorf("the oldest key stays, or a snapshot went: %v", files)
	}
	list, err := s.people.ListEscrow(t.Context(), &musterv1.ListEscrowRequest{Site: "shop-7"})
	s.must(err)
	keys := 0
	for _, x := range list.Blobs {
		if x.Kind == escrow.KindDiskKey && x.Node == string(a.ID) && x.Cluster == "" {
			keys++
		}
	}
	if keys != diskKeysPerNode {
		t.Errorf("%d disk keys are listed", keys)
	}
	s.later()
	before := len(s.files())
	for name, c := range map[string]struct {
		blob   []byte
		change func(*musterv1.EscrowHeader)
		code   connect.Code
	}{
		"of another node":         {s.diskKey(a.ID, "x"), asDiskKey, connect.CodeInvalidArgument},
		"announced as a snapshot": {s.diskKey(b.ID, "x"), nil, connect.CodeInvalidArgument},
		"a snapshot as a key":     {s.sealed(b, "shop-7", "x", s.public), asDiskKey, connect.CodeInvalidArgument},
		"too large":               {s.diskKey(b.ID, strings.Repeat("x", escrow.MaxDiskKey)), asDiskKey, connect.CodeInvalidArgument},
		"of no kind":              {s.diskKey(b.ID, "x"), func(h *musterv1.EscrowHeader) { h.Kind = "soup" }, connect.CodeInvalidArgument},
	} {
		if _, err := s.put(b, c.blob, c.change); connect.CodeOf(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
		s.later()
	}
	if n := len(s.files()); n != before {
		t.Errorf("%d files were left by what was refused", n-before)
	}
}
