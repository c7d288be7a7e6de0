package statement

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const kind = "application/vnd.muster.test.v1+json"

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func edKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func public(signers ...crypto.Signer) (keys []crypto.PublicKey) {
	for _, s := range signers {
		keys = append(keys, s.Public())
	}
	return keys
}

func mustSign(t testing.TB, payload []byte, signers ...crypto.Signer) Envelope {
	t.Helper()
	e, err := Sign(kind, payload, signers...)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// The example of the DSSE specification (protocol.md, "Test Vectors").
func TestPreAuthenticationEncoding(t *testing.T) {
	for _, row := range []struct{ kind, payload, want string }{
		{"http://example.com/HelloWorld", "hello world", "DSSEv1 29 http://example.com/HelloWorld 11 hello world"},
		{"", "", "DSSEv1 0  0 "},
		{"é", "1 2", "DSSEv1 2 é 3 1 2"},
	} {
		if got := string(encode(row.kind, []byte(row.payload))); got != row.want {
			t.Errorf("PAE(%q, %q) is %q, want %q", row.kind, row.payload, got, row.want)
		}
	}
}

func TestEncodingIsInjective(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := rapid.StringMatching(`[0-9 a]{0,6}`), rapid.StringMatching(`[0-9 a]{0,6}`)
		t1, p1, t2, p2 := a.Draw(t, "t1"), b.Draw(t, "p1"), a.Draw(t, "t2"), b.Draw(t, "p2")
		if bytes.Equal(encode(t1, []byte(p1)), encode(t2, []byte(p2))) != (t1 == t2 && p1 == p2) {
			t.Fatalf("(%q, %q) and (%q, %q)", t1, p1, t2, p2)
		}
	})
}

func TestSignAndVerify(t *testing.T) {
	ec, ed, other := ecKey(t), edKey(t), ecKey(t)
	payload := []byte(`{"a":"<é>"}`)
	for name, signers := range map[string][]crypto.Signer{"ECDSA": {ec}, "Ed25519": {ed}, "both": {ec, ed}} {
		text := mustSign(t, payload, signers...).JSON()
		for _, s := range signers {
			got, err := Verify(text, kind, public(other, s))
			if err != nil || !bytes.Equal(got, payload) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		if _, err := Verify(text, kind, public(other, edKey(t))); !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: with foreign keys: %v", name, err)
		}
		if _, err := Verify(text, kind, nil); !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: without keys: %v", name, err)
		}
		if _, err := Verify(text, kind+"x", public(signers...)); err == nil || errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: as another kind: %v", name, err)
		}
	}
	if got, err := Verify(mustSign(t, nil, ec).JSON(), kind, public(ec)); err != nil || len(got) != 0 {
		t.Errorf("empty payload: %q, %v", got, err)
	}
}

// The signature is standard ECDSA over SHA-256 of the encoding, and nothing of
// our own: another program can check it.
func TestSignatureIsPlainECDSA(t *testing.T) {
	k := ecKey(t)
	e := mustSign(t, []byte("x"), k)
	digest := sha256.Sum256([]byte("DSSEv1 35 " + kind + " 1 x"))
	if !ecdsa.VerifyASN1(&k.PublicKey, digest[:], e.Signatures[0].Sig) {
		t.Error("the signature is not over PAE")
	}
}

func TestChangedEnvelopesAreRefused(t *testing.T) {
	k, k2 := ecKey(t), ecKey(t)
	good := mustSign(t, []byte(`{"n":1}`), k)
	second := mustSign(t, []byte(`{"n":2}`), k)
	for name, change := range map[string]func(*Envelope){
		"payload":              func(e *Envelope) { e.Payload = []byte(`{"n":2}`) },
		"signature bit":        func(e *Envelope) { e.Signatures[0].Sig[10] ^= 1 },
		"no signature":         func(e *Envelope) { e.Signatures = nil },
		"empty signature":      func(e *Envelope) { e.Signatures[0].Sig = nil },
		"signature of another": func(e *Envelope) { e.Signatures = second.Signatures },
		"wrong key ID":         func(e *Envelope) { e.Signatures[0].KeyID = "00" },
		"foreign signer":       func(e *Envelope) { e.Signatures = mustSign(t, e.Payload, k2).Signatures },
		"many signatures": func(e *Envelope) {
			e.Signatures = append(make([]Signature, MaxSignatures), e.Signatures...)
		},
	} {
		e := good
		e.Signatures = []Signature{{KeyID: good.Signatures[0].KeyID, Sig: bytes.Clone(good.Signatures[0].Sig)}}
		change(&e)
		if _, err := Verify(e.JSON(), kind, public(k)); err == nil {
			t.Errorf("%s: it was taken", name)
		}
		if _, err := e.VerifiedBy(kind, public(k)); err == nil {
			t.Errorf("%s: it was taken without JSON", name)
		}
	}
	// A payload type that was changed together with what the caller wants.
	e := good
	e.PayloadType = "application/other"
	if _, err := Verify(e.JSON(), "application/other", public(k)); !errors.Is(err, ErrUntrusted) {
		t.Errorf("changed type: %v", err)
	}
}

func TestVerifyWithoutKeyIDAndURLSafeBase64(t *testing.T) {
	k := ecKey(t)
	payload := []byte{0xfb, 0xff, 0xfe, 0x3e, 0x3f}
	e := mustSign(t, payload, edKey(t), k)
	for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		text := `{"payloadType":"` + kind + `","payload":"` + enc.EncodeToString(payload) +
			`","signatures":[{"sig":"` + enc.EncodeToString(e.Signatures[1].Sig) + `"}],"more":1}`
		if got, err := Verify([]byte(text), kind, public(k)); err != nil || !bytes.Equal(got, payload) {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
}

func TestVerifiedByNamesTheKey(t *testing.T) {
	a, b := ecKey(t), edKey(t)
	e := mustSign(t, []byte("x"), b)
	if i, err := e.VerifiedBy(kind, public(a, b)); i != 1 || err != nil {
		t.Errorf("key %d, %v", i, err)
	}
}

func TestOnlyTwoKindsOfKeys(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := mustSign(t, []byte("x"), ecKey(t))
	for name, k := range map[string]crypto.Signer{"RSA": rsaKey, "P-384": p384} {
		if _, err := Sign(kind, []byte("x"), k); err == nil {
			t.Errorf("%s: it signed", name)
		}
		if _, err := Verify(good.JSON(), kind, public(k)); err == nil || errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: as a trusted key: %v", name, err)
		}
	}
	for _, k := range []crypto.PublicKey{nil, (*ecdsa.PublicKey)(nil), ed25519.PublicKey{1}, "key"} {
		if id, err := KeyID(k); err == nil {
			t.Errorf("%#v has the ID %s", k, id)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	k := ecKey(t)
	if _, err := Sign(kind, []byte("x")); err == nil {
		t.Error("without signers")
	}
	if _, err := Sign("", []byte("x"), k); err == nil {
		t.Error("without a type")
	}
	if _, err := Sign(strings.Repeat("x", 300), []byte("x"), k); err == nil {
		t.Error("with a long type")
	}
	if _, err := Sign(kind, make([]byte, MaxEnvelope), k); err == nil {
		t.Error("with a payload that no reader takes")
	}
	many := make([]crypto.Signer, MaxSignatures+1)
	for i := range many {
		many[i] = k
	}
	if _, err := Sign(kind, []byte("x"), many...); err == nil {
		t.Error("with too many signers")
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(mustSign(t, []byte("x"), ecKey(t)).JSON())
	if _, err := Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"nothing":         "",
		"null":            "null",
		"array":           "[" + good + "]",
		"two envelopes":   good + good,
		"rubbish behind":  good + "x",
		"cut off":         good[:len(good)-1],
		"no type":         strings.Replace(good, kind, "", 1),
		"base64":          strings.Replace(good, `"payload":"`, `"payload":"!`, 1),
		"base64 bits":     strings.Replace(good, `"payload":"eA=="`, `"payload":"eB=="`, 1),
		"huge":            strings.Repeat(" ", MaxEnvelope) + good,
		"signatures null": strings.Replace(good, `"signatures":[`, `"signatures":null,"x":[`, 1),
		"deep":            strings.Repeat("[", 100000),
	} {
		if text == good {
			t.Fatalf("%s: nothing was changed", name)
		}
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
}

func TestParseKeys(t *testing.T) {
	block := func(kind string, key any) string {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	a, b := ecKey(t), edKey(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	text := "release keys\n" + block("PUBLIC KEY", a.Public()) + "\n" + block("PUBLIC KEY", b.Public())
	keys, err := ParseKeys([]byte(text))
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	if got, err := Verify(mustSign(t, []byte("x"), b).JSON(), kind, keys); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	for name, bad := range map[string]string{
		"nothing": "", "text": "hello", "certificate": block("CERTIFICATE", a.Public()), "RSA": block("PUBLIC KEY", rsaKey.Public()),
		"one of two": text + block("PUBLIC KEY", rsaKey.Public()), "huge": text + strings.Repeat("\n", maxKeyFile),
	} {
		if _, err := ParseKeys([]byte(bad)); err == nil {
			t.Errorf("%s: it was read", name)
		}
	}
}

func FuzzVerify(f *testing.F) {
	k := ecKey(f)
	good := mustSign(f, []byte(`{"n":1}`), k).JSON()
	f.Add(good)
	f.Add([]byte(`{"payloadType":"x","payload":"_-==","signatures":[{"keyid":"","sig":"AA=="}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		payload, err := Verify(text, kind, public(k))
		if err == nil && string(payload) != `{"n":1}` {
			t.Fatalf("forged: %q", payload)
		}
		e, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(e.JSON())
		if err != nil || !bytes.Equal(again.Payload, e.Payload) || len(again.Signatures) != len(e.Signatures) {
			t.Fatalf("%s is written as %s, %v", text, e.JSON(), err)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	der, err := x509.MarshalPKIXPublicKey(ecKey(f).Public())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := ParseKeys(text)
		if err != nil {
			return
		}
		for _, k := range keys {
			if _, err := KeyID(k); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestJSONForm(t *testing.T) {
	var m map[string]any
	if err := json.Unmarshal(mustSign(t, nil, ecKey(t)).JSON(), &m); err != nil {
		t.Fatal(err)
	}
	if m["payload"] != "" || m["payloadType"] != kind || len(m) != 3 {
		t.Errorf("envelope is %v", m)
	}
}
