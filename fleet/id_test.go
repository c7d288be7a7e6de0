package fleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestNodeIDIsFrozen(t *testing.T) {
	h, err := ParseEKHash("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	if err != nil {
		t.Fatal(err)
	}
	// RFC 4648 base32 of 00..0e in lower case.
	if got, want := h.NodeID(), NodeID("n-aaaqeayeaudaocajbifqydio"); got != want {
		t.Errorf("node ID is %s, want %s", got, want)
	}
	if got, want := RequestIDOf(h), RequestID("r-aaaqeayeaudaocajbifqydio"); got != want {
		t.Errorf("request ID is %s, want %s", got, want)
	}
}

func TestHashEK(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	if h, err := HashEK(k.Public()); err != nil || h != sha256.Sum256(der) {
		t.Errorf("hash is %s, %v", h, err)
	}
	for _, bad := range []any{nil, "key", k} {
		if h, err := HashEK(bad); err == nil {
			t.Errorf("%T has the hash %s", bad, h)
		}
	}
}

func TestIDsAreWellFormed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := EKHash(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "hash"))
		id := h.NodeID()
		if err := id.Validate(); err != nil {
			t.Fatal(err)
		}
		if err := RequestIDOf(h).Validate(); err != nil {
			t.Fatal(err)
		}
		b, err := id.bytes()
		if err != nil || string(b) != string(h[:15]) {
			t.Fatalf("%s holds %x, %v; want %x", id, b, err, h[:15])
		}
		if err := ValidateName("node", string(id)); err != nil {
			t.Fatalf("a node ID must be a DNS label: %v", err)
		}
		for _, form := range []string{h.String(), strings.ToUpper(h.String()), " " + h.String() + "\n"} {
			if got, err := ParseEKHash(form); err != nil || got != h {
				t.Fatalf("%q is read as %s, %v", form, got, err)
			}
		}
	})
}

func TestMalformedIDs(t *testing.T) {
	good := "n-aaaqeayeaudaocajbifqydio"
	for _, bad := range []string{"", "n-", good + "a", good[:25], strings.ToUpper(good), "n-0aaqeayeaudaocajbifqydio", good + "\n", " " + good, "r" + good[1:], strings.Repeat("n", 1<<16)} {
		if err := NodeID(bad).Validate(); err == nil {
			t.Errorf("node ID %.40q is valid", bad)
		} else if len(err.Error()) > 400 {
			t.Errorf("the error has %d characters", len(err.Error()))
		}
	}
	if err := RequestID(good).Validate(); err == nil {
		t.Error("a node ID is a valid request ID")
	}
}

func TestValidateName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "shop-1": true, strings.Repeat("a", 63): true, "0": true,
		"": false, "-a": false, "a-": false, "A": false, "a.b": false, "a_b": false, "a b": false, "é": false, "a\n": false,
		strings.Repeat("a", 64): false,
	} {
		if got := ValidateName("site", name) == nil; got != want {
			t.Errorf("name %q: %v", name, got)
		}
	}
}

func FuzzParseEKHash(f *testing.F) {
	f.Add(EKHash{}.String())
	f.Add("00:11")
	f.Fuzz(func(t *testing.T, s string) {
		h, err := ParseEKHash(s)
		if err != nil {
			return
		}
		if again, err := ParseEKHash(h.String()); err != nil || again != h {
			t.Fatalf("%q is read as %s and then as %s, %v", s, h, again, err)
		}
	})
}

func FuzzParseDocVersion(f *testing.F) {
	f.Add("1.2")
	f.Add("18446744073709551615.0")
	f.Add("01.+2")
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseDocVersion(s); err == nil && v.String() != s {
			t.Fatalf("%q is read as %s", s, v)
		}
	})
}

func TestDocVersionsAreOrdered(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(n string) DocVersion {
			return DocVersion{rapid.Uint64Range(0, 3).Draw(t, n+" epoch"), rapid.Uint64Range(0, 3).Draw(t, n+" n")}
		}
		a, b := draw("a"), draw("b")
		if a.Compare(b) != -b.Compare(a) || (a.Compare(b) == 0) != (a == b) {
			t.Fatalf("%s and %s", a, b)
		}
		if a.Epoch < b.Epoch && a.Compare(b) != -1 {
			t.Fatalf("%s is not older than %s", a, b)
		}
	})
	for _, bad := range []string{"", "1", "1.", ".1", "1.2.3", "-1.2", "01.2", "1.+2", "1. 2", "99999999999999999999.1"} {
		if v, err := ParseDocVersion(bad); err == nil {
			t.Errorf("%q is read as %s", bad, v)
		}
	}
}
