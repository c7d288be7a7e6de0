package peer

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/agent/papers"
	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	"github.com/muster-edge/muster/fleet/escrow"
)

func blobOf(data []byte) Blob {
	return Blob{SHA256: sha256.Sum256(data), Size: int64(len(data)), Name: "snapshot-1", UID: cluster, Epoch: 2}
}

// payload is n bytes that differ from those of any other k.
func payload(k, n int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%07d\n", k)), n/8+1)[:n] }

func get(t *testing.T, c *Conn, ref papers.Ref) ([]byte, error) {
	t.Helper()
	var b bytes.Buffer
	_, err := c.GetEscrow(t.Context(), ref, &b)
	return b.Bytes(), err
}

func TestEscrow(t *testing.T) {
	s, a, b := pair(t)
	other := newNode(t, s)
	other.learn(s.signCharter(t, nil), s.admission(t, other, nil))
	other.start(nil)
	c := a.meet(b)
	data := payload(1, 3*maxChunk+17)
	if err := c.KeepEscrow(t.Context(), blobOf(data), bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	t.Run("any admitted node gets it back", func(t *testing.T) {
		got, err := get(t, other.meet(b), sha256.Sum256(data))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		list, err := other.meet(b).ListEscrow(t.Context())
		want := blobOf(data)
		want.Owner = a.id
		if err != nil || len(list) != 1 || list[0] != want {
			t.Errorf("%+v, %v", list, err)
		}
	})
	t.Run("the connection is good for more", func(t *testing.T) {
		if _, _, err := c.Status(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("twice is once", func(t *testing.T) {
		if err := c.KeepEscrow(t.Context(), blobOf(data), bytes.NewReader(data)); err != nil {
			t.Error(err)
		}
		if n := len(b.peer.escrow.list()); n != 1 {
			t.Errorf("%d blobs", n)
		}
	})
	t.Run("what is not there", func(t *testing.T) {
		c := a.meet(b)
		if _, err := get(t, c, papers.Ref{1}); !errors.Is(err, ErrNotKept) {
			t.Errorf("%v, want ErrNotKept", err)
		}
	})
	wrong := payload(2, 100)
	for name, x := range map[string]struct {
		blob Blob
		data []byte
	}{
		"another content": {blobOf(wrong), payload(3, 100)},
		"too short":       {blobOf(wrong), wrong[:99]},
		"too long":        {blobOf(wrong), append(bytes.Clone(wrong), 1)},
		"no size":         {Blob{SHA256: sha256.Sum256(nil)}, nil},
		"a bad name":      {func() Blob { b := blobOf(wrong); b.Name = "../x"; return b }(), wrong},
	} {
		t.Run(name, func(t *testing.T) {
			if err := a.meet(b).KeepEscrow(t.Context(), x.blob, bytes.NewReader(x.data)); err == nil {
				t.Error("it was kept")
			}
		})
	}
	t.Run("nothing is left of them", func(t *testing.T) {
		entries, err := os.ReadDir(b.peer.escrow.dir)
		if err != nil || len(entries) != 2 || len(b.peer.escrow.coming) != 0 {
			t.Errorf("%v, %v, %v", entries, err, b.peer.escrow.coming)
		}
	})
	t.Run("the oldest of an owner goes, and of nobody else", func(t *testing.T) {
		theirs := payload(9, 500)
		if err := other.meet(b).KeepEscrow(t.Context(), blobOf(theirs), bytes.NewReader(theirs)); err != nil {
			t.Fatal(err)
		}
		c := a.meet(b)
		for k := 4; k < 6; k++ {
			d := payload(k, 1000)
			if err := c.KeepEscrow(t.Context(), blobOf(d), bytes.NewReader(d)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := get(t, c, sha256.Sum256(data)); !errors.Is(err, ErrNotKept) {
			t.Errorf("the oldest is still there: %v", err)
		}
		for _, d := range [][]byte{payload(4, 1000), payload(5, 1000), theirs} {
			if got, err := get(t, c, sha256.Sum256(d)); err != nil || !bytes.Equal(got, d) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		}
	})
	t.Run("a restart keeps what is whole", func(t *testing.T) {
		dir := b.peer.escrow.dir
		last := payload(5, 1000)
		for name, content := range map[string]string{"00ff.blob": "x", ".00ff.blob123": "half", "00fe.json": "{", "00fd.json": `{"sha256":"00fd","size":1}`} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		again, err := openStore(dir, b.peer.cfg.Limits)
		if err != nil || len(again.list()) != 3 || again.list()[2].SHA256 != sha256.Sum256(last) {
			t.Fatalf("%+v, %v", again.list(), err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 6 {
			t.Errorf("%v is left", entries)
		}
	})
	t.Run("rot on the disk is noticed by who gets it", func(t *testing.T) {
		ref := papers.Ref(sha256.Sum256(payload(5, 1000)))
		if err := os.WriteFile(b.peer.escrow.path(ref, blobSuffix), payload(6, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := get(t, a.meet(b), ref); !errors.Is(err, ErrNotKept) || !strings.Contains(err.Error(), "digest") {
			t.Errorf("%v", err)
		}
	})
}

func TestEscrowHasBounds(t *testing.T) {
	s := newSite(t)
	a, b := newNode(t, s), newNode(t, s)
	charter, forA, forB := s.signCharter(t, nil), s.admission(t, a, nil), s.admission(t, b, nil)
	a.learn(charter, forA, forB)
	b.learn(charter, forA, forB)
	a.start(func(c *Config) { c.EscrowDir = "" })
	b.start(func(c *Config) { c.Limits = Limits{EscrowSize: 1000, EscrowTotal: 1500} })
	keep := func(c *Conn, n, k int) error {
		d := payload(k, n)
		return c.KeepEscrow(t.Context(), blobOf(d), bytes.NewReader(d))
	}
	if err := keep(a.meet(b), 1001, 1); !errors.Is(err, ErrNotKept) {
		t.Errorf("too large: %v", err)
	}
	if err := keep(a.meet(b), 1000, 2); err != nil {
		t.Errorf("positive twin: %v", err)
	}
	if err := keep(a.meet(b), 501, 3); !errors.Is(err, ErrNotKept) {
		t.Errorf("no room: %v", err)
	}
	if err := keep(a.meet(b), 500, 4); err != nil {
		t.Errorf("positive twin: %v", err)
	}
	if err := keep(b.meet(a), 1, 5); !errors.Is(err, ErrNotKept) {
		t.Errorf("a node that keeps nothing: %v", err)
	}
	// One at a time for each node.
	b.peer.escrow.coming[a.id] = 1
	if err := keep(a.meet(b), 1, 6); !errors.Is(err, ErrNotKept) {
		t.Errorf("two at once: %v", err)
	}
	delete(b.peer.escrow.coming, a.id)
	// A header in the middle, and none at the beginning.
	stream, err := a.meet(b).rpc.KeepEscrow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&peerv1.KeepEscrowRequest{Data: []byte("x")})
	if _, err := stream.CloseAndReceive(); err == nil {
		t.Error("a blob without header was kept")
	}
}

func TestADiskKeyHasAPlaceOfItsOwn(t *testing.T) {
	_, a, b := pair(t)
	c := a.meet(b)
	keep := func(data []byte, kind string) error {
		x := blobOf(data)
		if x.Kind = kind; kind != "" {
			x.UID, x.Epoch = "", 0
		}
		return c.KeepEscrow(t.Context(), x, bytes.NewReader(data))
	}
	key := payload(1, 900)
	if err := keep(key, escrow.KindDiskKey); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		if err := keep(payload(10+i, 2000), ""); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := get(t, c, sha256.Sum256(key)); err != nil || !bytes.Equal(got, key) {
		t.Fatal("snapshots pushed the disk key out:", err)
	}
	if err := keep(payload(2, 900), escrow.KindDiskKey); err != nil {
		t.Fatal(err)
	}
	if _, err := get(t, c, sha256.Sum256(key)); !errors.Is(err, ErrNotKept) {
		t.Error("two disk keys of one node:", err)
	}
	list, err := c.ListEscrow(t.Context())
	if err != nil || len(list) != 3 || list[2].Kind != escrow.KindDiskKey {
		t.Errorf("%+v, %v", list, err)
	}
	if err := keep(payload(3, escrow.MaxDiskKey+1), escrow.KindDiskKey); err == nil {
		t.Error("a disk key of any size was kept")
	}
	if err := keep(payload(4, 900), "soup"); err == nil {
		t.Error("a blob of no kind was kept")
	}
}
