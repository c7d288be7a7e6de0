package blobs

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func open(t *testing.T) *Dir {
	t.Helper()
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(b)
	return b
}

func TestAFileComesInPieces(t *testing.T) {
	d := open(t)
	content := random(100_000)
	id := Digest(sha256.Sum256(content))
	have, whole := int64(0), false
	for cuts := 0; !whole; cuts++ {
		piece := content[have:min(int(have)+7_777, len(content))]
		var r io.Reader = bytes.NewReader(piece)
		if cuts%3 == 1 { // the line breaks in the middle of the piece
			r = io.MultiReader(bytes.NewReader(piece[:len(piece)/2]), broken{})
		}
		next, done, err := d.Append(id, int64(len(content)), have, r)
		if (err != nil) != (cuts%3 == 1) {
			t.Fatalf("piece %d: %v", cuts, err)
		}
		if at, _, err := d.State(id); err != nil || at != next {
			t.Fatalf("piece %d: acknowledged %d, there are %d, %v", cuts, next, at, err)
		}
		have, whole = next, done
	}
	f, err := d.File(id)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if back, err := io.ReadAll(f); err != nil || !bytes.Equal(back, content) {
		t.Fatalf("what came back differs (%v)", err)
	}
	// Once more changes nothing, wherever the piece begins.
	if have, whole, err := d.Append(id, int64(len(content)), 5, strings.NewReader("x")); err != nil || !whole || have != int64(len(content)) {
		t.Errorf("once more: %d %v %v", have, whole, err)
	}
	if n, err := d.Pending(); err != nil || n != 0 {
		t.Errorf("%d bytes are pending, %v", n, err)
	}
	if err := d.Remove(id); err != nil {
		t.Fatal(err)
	}
	if _, err := d.File(id); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after removal: %v", err)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("the line broke") }

func TestWhatIsRefused(t *testing.T) {
	d := open(t)
	content := random(1000)
	id := Digest(sha256.Sum256(content))
	var offset *OffsetError
	if _, _, err := d.Append(id, 1000, 10, bytes.NewReader(content[10:])); !errors.As(err, &offset) || offset.Have != 0 {
		t.Errorf("a piece with a gap before it: %v", err)
	}
	for name, sent := range map[string][]byte{"another file": random(1001)[:1000], "a longer file": append(random(1000), 0)} {
		if _, _, err := d.Append(id, 1000, 0, bytes.NewReader(sent)); !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
		if have, whole, err := d.State(id); have != 0 || whole || err != nil {
			t.Errorf("%s: %d bytes of it are kept, whole %v, %v", name, have, whole, err)
		}
	}
	leave, err := d.enter(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.Append(id, 1000, 0, bytes.NewReader(content)); !errors.Is(err, ErrBusy) {
		t.Errorf("two at once: %v", err)
	}
	leave()
	for _, bad := range []string{"", "..", "../../etc/passwd", id.String()[:63], strings.ToUpper(id.String()), id.String() + "/", id.String() + "0"} {
		if _, err := ParseDigest(bad); err == nil {
			t.Errorf("%q is a digest", bad)
		}
	}
}

func TestTidy(t *testing.T) {
	d := open(t)
	content := random(100)
	id := Digest(sha256.Sum256(content))
	if _, _, err := d.Append(id, 100, 0, bytes.NewReader(content[:50])); err != nil {
		t.Fatal(err)
	}
	rubbish := filepath.Join(d.path, partialDir, "rubbish")
	if err := os.WriteFile(rubbish, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := d.Tidy(time.Now().Add(-time.Hour)); n != 0 || err != nil {
		t.Errorf("%d young files are tidied, %v", n, err)
	}
	if n, err := d.Pending(); n != 50 || err != nil {
		t.Errorf("%d bytes are pending, %v", n, err)
	}
	if n, err := d.Tidy(time.Now().Add(time.Hour)); n != 2 || err != nil {
		t.Errorf("%d old files are tidied, want 2, %v", n, err)
	}
	if _, _, err := d.Append(id, 100, 0, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	seen := 0
	if err := d.Whole(func(got Digest, info fs.FileInfo) error {
		seen++
		if got != id || info.Size() != 100 {
			t.Errorf("%s with %d bytes", got, info.Size())
		}
		return nil
	}); err != nil || seen != 1 {
		t.Errorf("%d files, %v", seen, err)
	}
}

func FuzzParseDigest(f *testing.F) {
	f.Add(strings.Repeat("a", 64))
	f.Add("../" + strings.Repeat("a", 61))
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDigest(s); err == nil && (d.String() != s || filepath.Base(s) != s) {
			t.Fatalf("%q is read as %s", s, d)
		}
	})
}
