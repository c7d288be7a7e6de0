package escrow_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

func keys(t interface{ Fatal(...any) }) (private, public []byte) {
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return private, public
}

func header() escrow.Header {
	return escrow.Header{
		Tenant: "default", Site: "shop-1", Node: fleet.EKHash{1}.NodeID(), Cluster: "c-1", Epoch: 3,
		Taken: time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

func seal(t interface{ Fatal(...any) }, public, plain []byte) []byte {
	var b bytes.Buffer
	n, err := escrow.Seal(&b, bytes.NewReader(plain), public, header())
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(b.Len()) {
		t.Fatal("written", n, "of", b.Len())
	}
	return b.Bytes()
}

func TestSealAndOpenAtEveryChunkBoundary(t *testing.T) {
	private, public := keys(t)
	for _, size := range []int{0, 1, escrow.ChunkSize - 1, escrow.ChunkSize, escrow.ChunkSize + 1, 3 * escrow.ChunkSize, 3*escrow.ChunkSize + 7} {
		plain := bytes.Repeat([]byte("snapshot "), size/9+1)[:size]
		blob := seal(t, public, plain)
		if size > 64 && bytes.Contains(blob, plain[:64]) {
			t.Fatal("the plaintext is in the blob")
		}
		var out bytes.Buffer
		h, err := escrow.Open(&out, bytes.NewReader(blob), private)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		want := header()
		want.KeyID = escrow.KeyID(public)
		if h != want || !bytes.Equal(out.Bytes(), plain) {
			t.Fatalf("%d bytes became %d with %+v", size, out.Len(), h)
		}
		seen, err := escrow.Inspect(bytes.NewReader(blob))
		if err != nil || seen != h {
			t.Fatalf("inspect: %+v %v", seen, err)
		}
	}
}

func TestTwoBlobsOfOneSnapshotDiffer(t *testing.T) {
	_, public := keys(t)
	if bytes.Equal(seal(t, public, []byte("x")), seal(t, public, []byte("x"))) {
		t.Fatal("sealing is not random")
	}
}

func TestAnotherKeyOpensNothing(t *testing.T) {
	_, public := keys(t)
	other, _ := keys(t)
	var out bytes.Buffer
	if _, err := escrow.Open(&out, bytes.NewReader(seal(t, public, []byte("x"))), other); !errors.Is(err, escrow.ErrWrongKey) || out.Len() != 0 {
		t.Fatal(err, out.Len())
	}
	// Also if the header is made to name that key.
	otherPublic, err := escrow.PublicOf(other)
	if err != nil {
		t.Fatal(err)
	}
	blob := bytes.Replace(seal(t, public, []byte("x")), []byte(escrow.KeyID(public)), []byte(escrow.KeyID(otherPublic)), 1)
	if _, err := escrow.Open(&out, bytes.NewReader(blob), other); !errors.Is(err, escrow.ErrDamaged) || out.Len() != 0 {
		t.Fatal(err, out.Len())
	}
}

// Every changed bit, every cut, every swap of chunks is noticed, and what came
// out until then is a beginning of the truth.
func TestDamageIsNoticed(t *testing.T) {
	private, public := keys(t)
	plain := bytes.Repeat([]byte("abcdefgh"), escrow.ChunkSize*5/16)
	blob := seal(t, public, plain)
	bad := func(name string, b []byte) {
		t.Helper()
		var out bytes.Buffer
		_, err := escrow.Open(&out, bytes.NewReader(b), private)
		if err == nil || !errors.Is(err, escrow.ErrDamaged) && !errors.Is(err, escrow.ErrWrongKey) {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.HasPrefix(plain, out.Bytes()) {
			t.Fatalf("%s: wrong bytes came out", name)
		}
	}
	for i := 0; i < len(blob); i += 1 + i/64 {
		b := bytes.Clone(blob)
		b[i] ^= 1 << (i % 8)
		bad(fmt.Sprint("bit at ", i), b)
		bad(fmt.Sprint("cut at ", i), blob[:i])
	}
	bad("one byte more", append(bytes.Clone(blob), 0))
	start := len(blob)
	var at []int
	info := bytes.Index(blob, []byte("}")) + 1 + 32
	for p := info; p < len(blob); {
		at = append(at, p)
		p += 4 + int(binary.BigEndian.Uint32(blob[p:]))
	}
	if len(at) != 3 {
		t.Fatal("chunks:", len(at), start)
	}
	swapped := append(bytes.Clone(blob[:at[0]]), blob[at[1]:at[2]]...)
	swapped = append(append(swapped, blob[at[0]:at[1]]...), blob[at[2]:]...)
	bad("two chunks swapped", swapped)
	bad("a chunk twice", append(append(bytes.Clone(blob[:at[1]]), blob[at[0]:at[1]]...), blob[at[1]:]...))
	bad("a chunk left out", append(bytes.Clone(blob[:at[1]]), blob[at[2]:]...))
	bad("the last chunk left out", blob[:at[2]])
}

func contents(snapshot []byte) escrow.Contents {
	sum := sha256.Sum256(snapshot)
	return escrow.Contents{Name: "etcd-1", Size: int64(len(snapshot)), SHA256: hex.EncodeToString(sum[:]), Token: "K10secret::server:x", K3s: "v1.36.3+k3s1"}
}

func TestSnapshotAndToken(t *testing.T) {
	private, public := keys(t)
	snapshot := bytes.Repeat([]byte("etcd"), escrow.ChunkSize)
	var blob, out bytes.Buffer
	if _, err := escrow.SealSnapshot(&blob, public, header(), contents(snapshot), bytes.NewReader(snapshot)); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(blob.Bytes(), []byte("secret")) {
		t.Fatal("the token is readable")
	}
	// From the operator to the node that restores.
	nodePrivate, nodePublic := keys(t)
	var resealed bytes.Buffer
	if _, err := escrow.Reseal(&resealed, bytes.NewReader(blob.Bytes()), private, nodePublic); err != nil {
		t.Fatal(err)
	}
	h, c, err := escrow.OpenSnapshot(&out, &resealed, nodePrivate)
	if err != nil || c != contents(snapshot) || !bytes.Equal(out.Bytes(), snapshot) || h.Cluster != "c-1" || h.KeyID != escrow.KeyID(nodePublic) {
		t.Fatal(err, c, h)
	}
	for _, said := range []string{c.String(), fmt.Sprintf("%v %+v %#v", c, c, c)} {
		if strings.Contains(said, "secret") {
			t.Fatal("the token is shown:", said)
		}
	}
	if _, err := escrow.Reseal(io.Discard, bytes.NewReader(blob.Bytes()), nodePrivate, nodePublic); !errors.Is(err, escrow.ErrWrongKey) {
		t.Fatal("resealed without the key:", err)
	}
	if _, err := escrow.Reseal(io.Discard, bytes.NewReader(blob.Bytes()[:blob.Len()-1]), private, nodePublic); !errors.Is(err, escrow.ErrDamaged) {
		t.Fatal("resealed a cut blob:", err)
	}
}

func TestASnapshotThatChangesWhileItIsReadIsRefused(t *testing.T) {
	_, public := keys(t)
	snapshot := []byte("etcd")
	for _, other := range []string{"", "etc", "etcx", "etcde"} {
		if _, err := escrow.SealSnapshot(io.Discard, public, header(), contents(snapshot), strings.NewReader(other)); err == nil {
			t.Errorf("%q was sealed as %q", other, snapshot)
		}
	}
}

func TestABundleThatLiesIsRefused(t *testing.T) {
	private, public := keys(t)
	head := func(s string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
	}
	good := fmt.Sprintf(`{"name":"etcd-1","size":1,"sha256":"%x","token":"t"}`, sha256.Sum256([]byte("x")))
	cases := map[string][]byte{
		"nothing":            nil,
		"no contents":        {0, 0, 0, 0},
		"cut contents":       head(good)[:20],
		"no JSON":            head("nonsense"),
		"too long":           append(head(good), "xy"...),
		"too short":          head(good),
		"another snapshot":   append(head(good), "y"...),
		"leaves the folder":  append(head(strings.Replace(good, "etcd-1", "../x", 1)), "x"...),
		"no token":           append(head(strings.Replace(good, `"t"`, `""`, 1)), "x"...),
		"giant contents":     {0xff, 0xff, 0xff, 0xff},
		"a size below zero":  append(head(strings.Replace(good, `"size":1`, `"size":-1`, 1)), "x"...),
		"a size of a galaxy": append(head(strings.Replace(good, `"size":1`, `"size":9223372036854775807`, 1)), "x"...),
	}
	for name, plain := range cases {
		if _, _, err := escrow.OpenSnapshot(io.Discard, bytes.NewReader(seal(t, public, plain)), private); !errors.Is(err, escrow.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := escrow.OpenSnapshot(io.Discard, bytes.NewReader(seal(t, public, append(head(good), 'x'))), private); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

func TestHeaderMustBeWhole(t *testing.T) {
	_, public := keys(t)
	h := header()
	h.Site, h.Node, h.Taken = "", "x", time.Time{}
	_, err := escrow.Seal(io.Discard, strings.NewReader("x"), public, h)
	for _, want := range []string{"site", "node ID", "taken"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %s: %v", want, err)
		}
	}
}

func TestKeyFiles(t *testing.T) {
	private, public := keys(t)
	a, err := escrow.MarshalPrivate(private)
	if err != nil {
		t.Fatal(err)
	}
	b, err := escrow.MarshalPublic(public)
	if err != nil {
		t.Fatal(err)
	}
	backA, errA := escrow.ParsePrivate(a)
	backB, errB := escrow.ParsePublic(b)
	if errA != nil || errB != nil || !bytes.Equal(backA, private) || !bytes.Equal(backB, public) {
		t.Fatal(errA, errB)
	}
	if _, err := escrow.ParsePrivate(b); err == nil {
		t.Error("a public key was read as a private one")
	}
	if _, err := escrow.ParsePublic(a); err == nil {
		t.Error("a private key was read as a public one")
	}
	for _, k := range [][]byte{nil, make([]byte, 31), make([]byte, 33)} {
		if _, err := escrow.Seal(io.Discard, strings.NewReader("x"), k, header()); err == nil {
			t.Errorf("sealed to a key of %d bytes", len(k))
		}
	}
}

// What an independent reader of RFC 9180 would have to produce is pinned by
// the header's bytes: they are the info.
func TestHeaderIsFrozen(t *testing.T) {
	blob := seal(t, bytes.Repeat([]byte{9}, 32), nil)
	want := "muster/escrow/v1\n\x00\x00\x00\x9d" + `{"key_id":"` + escrow.KeyID(bytes.Repeat([]byte{9}, 32)) + `","tenant":"default","site":"shop-1","node":"n-aeaaaaaaaaaaaaaaaaaaaaaa","cluster":"c-1","epoch":3,"taken":"2027-01-02T03:04:05Z"}`
	if got := string(blob[:min(len(want), len(blob))]); got != want {
		t.Errorf("%q\nwant\n%q", got, want)
	}
}

func TestAnySizeComesBack(t *testing.T) {
	private, public := keys(t)
	rapid.Check(t, func(t *rapid.T) {
		plain := make([]byte, rapid.IntRange(0, 3*escrow.ChunkSize).Draw(t, "size"))
		var out bytes.Buffer
		if _, err := escrow.Open(&out, bytes.NewReader(seal(t, public, plain)), private); err != nil || !bytes.Equal(out.Bytes(), plain) {
			t.Fatal(err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	private, public := keys(f)
	f.Add(seal(f, public, []byte("x")))
	f.Add([]byte("muster/escrow/v1\n\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, blob []byte) {
		var out bytes.Buffer
		if _, err := escrow.Open(&out, bytes.NewReader(blob), private); err != nil && !errors.Is(err, escrow.ErrDamaged) && !errors.Is(err, escrow.ErrWrongKey) {
			t.Fatal(err)
		}
	})
}

func FuzzContents(f *testing.F) {
	private, public := keys(f)
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, plain []byte) {
		var out bytes.Buffer
		_, c, err := escrow.OpenSnapshot(&out, bytes.NewReader(seal(t, public, plain)), private)
		if err == nil && c.Validate() != nil {
			t.Fatal("bad contents were taken")
		}
		if err != nil && !errors.Is(err, escrow.ErrDamaged) {
			t.Fatal(err)
		}
	})
}
