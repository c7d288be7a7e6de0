package firmware

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestSlotMoves(t *testing.T) {
	for from := range numSlotStates {
		for to := range numSlotStates {
			got, err := from.MoveTo(to)
			switch {
			case err == nil && got != to, err != nil && got != from:
				t.Errorf("%s to %s: %s, %v", from, to, got, err)
			case from == SlotTrying && to == SlotWriting && err == nil:
				t.Error("the slot that runs may be overwritten")
			}
		}
		text, err := from.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back SlotState
		if err := back.UnmarshalText(text); err != nil || back != from {
			t.Errorf("%s came back as %s, %v", from, back, err)
		}
	}
	if _, err := SlotState(99).MoveTo(SlotState(99)); err == nil {
		t.Error("a state that does not exist may stay")
	}
	if err := new(SlotState).UnmarshalText([]byte("splendid")); err == nil {
		t.Error("a word that is no state was read")
	}
}

func TestJudge(t *testing.T) {
	sound := Health{Up: time.Minute, RootVerified: true, DataMounted: true, Identity: true, Wanted: true, Process: true, NodeReady: true,
		Server: true, Member: true, Quorum: true, APIReachable: true}
	late := func(h Health) Health { h.Up = 16 * time.Minute; return h }
	with := func(f func(*Health)) Health { h := sound; f(&h); return h }
	for _, c := range []struct {
		name string
		h    Health
		want Verdict
	}{
		{"sound server", sound, Healthy},
		{"sound worker", with(func(h *Health) { h.Server, h.Member, h.Quorum = false, false, false }), Healthy},
		{"waits for its site", with(func(h *Health) { h.Wanted, h.Process, h.NodeReady = false, false, false }), Healthy},
		{"waits for its site, without data", with(func(h *Health) { h.Wanted, h.DataMounted = false, false }), Undecided},
		{"root, early", with(func(h *Health) { h.RootVerified = false }), Undecided},
		{"root, late", late(with(func(h *Health) { h.RootVerified = false })), Failed},
		{"data, late", late(with(func(h *Health) { h.DataMounted = false })), Failed},
		{"identity, late", late(with(func(h *Health) { h.Identity = false })), Failed},
		{"k3s restarts, early", with(func(h *Health) { h.Process = false }), Undecided},
		{"k3s restarts, late", late(with(func(h *Health) { h.Process = false })), Failed},
		{"no quorum, late", late(with(func(h *Health) { h.Quorum, h.Member, h.NodeReady = false, false, false })), Undecided},
		{"own etcd, late", late(with(func(h *Health) { h.Member = false })), Failed},
		{"worker without servers, late", late(with(func(h *Health) { h.Server, h.Quorum, h.APIReachable, h.NodeReady = false, false, false, false })), Undecided},
		{"not ready, late", late(with(func(h *Health) { h.NodeReady = false })), Failed},
		{"late and sound", late(sound), Healthy},
	} {
		got, why := Gate{}.Judge(c.h)
		if got != c.want || why == "" {
			t.Errorf("%s: %s (%s); want %s", c.name, got, why, c.want)
		}
	}
}

// Nothing beyond the box's cable ever fails a system, however late it is.
func TestJudgeBlamesNobodyElse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := func(name string) bool { return rapid.Bool().Draw(t, name) }
		h := Health{Up: time.Duration(rapid.IntRange(0, 3600).Draw(t, "up")) * time.Second, RootVerified: true, DataMounted: true, Identity: true,
			Wanted: b("wanted"), Process: true, Server: b("server")}
		if h.Server {
			h.Member, h.NodeReady = b("member"), b("ready")
		}
		if v, why := (Gate{}).Judge(h); v == Failed {
			t.Fatalf("without quorum and servers: %s: %s", v, why)
		}
	})
}

func sampleMeta() Meta {
	d := func(n byte) (out Digest) { out[0] = n; return out }
	return Meta{
		Seq: 7,
		Slots: [2]Slot{
			{State: SlotGood, Image: d(1), Name: "edge", Version: "1.4.0", Entry: "edge-1.4.0.efi", K3s: "1.36", Etcd: "3.6"},
			{State: SlotWriting},
		},
		Update: &SlotUpdate{Slot: SlotB, Image: d(2), Order: "o-1", Verified: 4 << 20},
		Failed: []FailedImage{{Image: d(3), Version: "1.3.9", Reason: "k3s does not stay up", At: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)}},
		Starts: 1, Floor: time.Date(2026, 11, 2, 0, 0, 0, 0, time.UTC),
	}
}

func TestMetaRoundTrip(t *testing.T) {
	m := sampleMeta()
	copyA, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if len(copyA)%MetaSector != 0 {
		t.Errorf("a copy has %d bytes", len(copyA))
	}
	blank := make([]byte, MetaSector)
	for name, pair := range map[string][2][]byte{"first": {copyA, blank}, "second": {blank, copyA}, "beside garbage": {[]byte("garbage"), copyA}} {
		got, err := DecodeMeta(pair[0], pair[1])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(m, got); d != "" {
			t.Errorf("%s:\n%s", name, d)
		}
	}
	if _, err := DecodeMeta(blank, blank); !errors.Is(err, ErrMetaBlank) {
		t.Errorf("blank: %v", err)
	}
	if _, err := DecodeMeta(blank, []byte("garbage")); !errors.Is(err, ErrMetaDamaged) {
		t.Errorf("blank and garbage: %v", err)
	}
	later := bytes.Clone(copyA)
	later[7] = '2'
	sum := metaSum(later[:20], later[metaHeader:][:len(strings.TrimRight(string(later[metaHeader:]), "\x00"))])
	copy(later[20:], sum[:])
	if _, err := DecodeMeta(later, blank); !errors.Is(err, ErrMetaDamaged) || !strings.Contains(err.Error(), "MUSTERM2") {
		t.Errorf("a later form: %v", err)
	}
}

func TestMetaValidate(t *testing.T) {
	m := sampleMeta()
	m.Slots[0].Entry = ""
	m.Update.Slot = SlotA
	m.Starts = -1
	m.Recovery = strings.Repeat("x", maxReason+1)
	err := m.Validate()
	for _, want := range []string{"names no image or boot file", "update of slot a, which is good", "-1 starts", "recovery: 501 bytes"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in %v", want, err)
		}
	}
	if _, err := m.Encode(); err == nil {
		t.Error("a record with problems was written")
	}
}

func TestFailedImages(t *testing.T) {
	var m Meta
	id := func(n int) (d Digest) { d[0] = byte(n); d[31] = 1; return d }
	for i := range MaxFailed + 4 {
		m = m.WithFailed(FailedImage{Image: id(i), Version: fmt.Sprint(i), Reason: "r"})
	}
	if len(m.Failed) != MaxFailed {
		t.Fatalf("%d are remembered", len(m.Failed))
	}
	if _, ok := m.HasFailed(id(0)); ok {
		t.Error("the oldest is still there")
	}
	if f, ok := m.HasFailed(id(MaxFailed)); !ok || f.Version != fmt.Sprint(MaxFailed) {
		t.Error("a failed image was forgotten")
	}
	if m.WithoutFailed(id(MaxFailed)).Failed[0].Image != id(4) || len(m.WithoutFailed(id(MaxFailed)).Failed) != MaxFailed-1 {
		t.Error("clearing one image did something else")
	}
	if len(m.WithoutFailed(Digest{}).Failed) != 0 {
		t.Error("clearing all left some")
	}
}

// Whatever prefix of a write reaches the disk, and whatever is damaged in one
// copy, the record read is the old one or the new one.
func TestMetaPowerCuts(t *testing.T) {
	old := sampleMeta()
	next := old
	next.Seq++
	next.Update = &SlotUpdate{Slot: SlotB, Image: old.Update.Image, Verified: 8 << 20}
	disk := make([]byte, 2*MetaArea)
	older := old
	older.Seq--
	for _, m := range []Meta{older, old} {
		b, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		copy(disk[m.Area():], b)
	}
	b, err := next.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for cut := 0; cut <= len(b); cut++ {
		d := bytes.Clone(disk)
		copy(d[next.Area():], b[:cut])
		got, err := DecodeMeta(d[:MaxMeta], d[MetaArea:][:MaxMeta])
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if got.Seq != old.Seq && got.Seq != next.Seq {
			t.Fatalf("cut at %d: read sequence %d", cut, got.Seq)
		}
	}
}

func FuzzDecodeMeta(f *testing.F) {
	b, err := sampleMeta().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, []byte{})
	f.Add([]byte{}, b[:60])
	f.Fuzz(func(t *testing.T, first, second []byte) {
		m, err := DecodeMeta(first, second)
		if err != nil {
			return
		}
		again, err := m.Encode()
		if err != nil {
			t.Fatalf("read but not written: %v", err)
		}
		got, err := DecodeMeta(again, nil)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := json.Marshal(m)
		y, _ := json.Marshal(got)
		if !bytes.Equal(x, y) {
			t.Fatalf("%s\n%s", x, y)
		}
	})
}
