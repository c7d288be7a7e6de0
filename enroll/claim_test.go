package enroll

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/iotest"
)

func newClaim(t testing.TB) (string, []byte) {
	t.Helper()
	code, hash, err := NewClaim(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return code, hash
}

func TestAClaimCodeIsReadHoweverItIsTyped(t *testing.T) {
	code, want, err := NewClaim(bytes.NewReader(bytes.Repeat([]byte{0, 1, 31}, 5)))
	if err != nil || code != "01Z01-Z01Z0-1Z01"+code[len(code)-1:] && len(code) != 17 {
		t.Fatalf("%s, %v", code, err)
	}
	o := strings.NewReplacer("0", "o", "1", "l").Replace(strings.ToLower(code))
	for _, typed := range []string{code, strings.ToLower(code), strings.ReplaceAll(code, "-", ""), " " + strings.ReplaceAll(code, "-", " ") + " ", o} {
		if got, err := HashClaim(typed); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q: %v, %v", typed, got, err)
		}
	}
	other, hash := newClaim(t)
	if other == code || bytes.Equal(hash, want) {
		t.Error("two codes are the same")
	}
	for _, bad := range []string{"", "-", code[:16], code + "0", strings.Repeat("0", 65), strings.Replace(code, "0", "U", 1), strings.Replace(code, "0", "é", 1)} {
		if _, err := HashClaim(bad); err == nil {
			t.Errorf("%q was read", bad)
		} else if strings.Contains(err.Error(), code) {
			t.Errorf("the error repeats the code: %v", err)
		}
	}
	if _, _, err := NewClaim(iotest.ErrReader(errors.New("no randomness"))); err == nil {
		t.Error("a code without randomness")
	}
}

// Every wrong character and every swap of two is noticed: all of them are
// tried on a few codes.
func TestSlipsInAClaimCodeAreNoticed(t *testing.T) {
	for range 8 {
		code, _ := newClaim(t)
		plain := []byte(strings.ReplaceAll(code, "-", ""))
		for i := range plain {
			for _, c := range []byte(claimAlphabet) {
				slip := bytes.Clone(plain)
				slip[i] = c
				if _, err := HashClaim(string(slip)); (err == nil) != (c == plain[i]) {
					t.Fatalf("%s for %s: %v", slip, plain, err)
				}
			}
			for j := range plain {
				slip := bytes.Clone(plain)
				slip[i], slip[j] = slip[j], slip[i]
				if _, err := HashClaim(string(slip)); (err == nil) != (plain[i] == plain[j]) {
					t.Fatalf("%s for %s: %v", slip, plain, err)
				}
			}
		}
	}
}

func FuzzHashClaim(f *testing.F) {
	code, _ := newClaim(f)
	for _, s := range []string{code, strings.ToLower(code), "", "O0IL1-uUUUU-\x00\xff", strings.Repeat("0", 64)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if h, err := HashClaim(s); err == nil && len(h) != 32 {
			t.Errorf("%q: %x", s, h)
		}
	})
}

func TestATranscriptWithoutClaimIsWhatItWas(t *testing.T) {
	f := TranscriptFields{Nonce: []byte("n"), EK: []byte("e"), AK: []byte("a"), LDevID: []byte("l"), CSR: []byte("c"), Hardware: []byte("h"), Exporter: []byte("x")}
	d := newDigest(domainTranscript)
	for _, b := range []string{"n", "e", "a", "l", "c", "h", "x"} {
		d.text(b)
	}
	if Transcript(f) != d.sum() {
		t.Error("the transcript of version 1 has changed")
	}
	f.Claim = []byte{}
	if Transcript(f) != d.sum() {
		t.Error("an empty claim is a field")
	}
	seen := map[[32]byte]string{d.sum(): ""}
	for _, claim := range []string{"A", "B", "\x00"} {
		f.Claim = []byte(claim)
		if other, there := seen[Transcript(f)]; there {
			t.Errorf("claims %q and %q have one transcript", claim, other)
		}
		seen[Transcript(f)] = claim
	}
}
