package firmware

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet/statement"
)

func TestArtifact(t *testing.T) {
	a := Artifact{Format: ArtifactFormat, Name: "muster_1.0_amd64.deb", Size: 3, SHA256: Digest{1}}
	payload, err := a.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseArtifact(payload); err != nil || got != a {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := a.Differs(a.Name, a.Size, a.SHA256); err != nil {
		t.Error(err)
	}
	err = a.Differs("x", 4, Digest{2})
	for _, want := range []string{`"x"`, "4 bytes", Digest{2}.String()} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want all differences, also %s, got %v", want, err)
		}
	}
	for when, change := range map[string]func(*Artifact){
		"the format is another":    func(a *Artifact) { a.Format = ManifestFormat },
		"there is no name":         func(a *Artifact) { a.Name = "" },
		"the name has a folder":    func(a *Artifact) { a.Name = "../x" },
		"the name has a backslash": func(a *Artifact) { a.Name = `a\b` },
		"the name is two lines":    func(a *Artifact) { a.Name = "a\nok  b" },
		"the name turns around":    func(a *Artifact) { a.Name = "a\u202eb" },
		"the name is no text":      func(a *Artifact) { a.Name = "a\xff" },
		"the size is negative":     func(a *Artifact) { a.Size = -1 },
		"there is no digest":       func(a *Artifact) { a.SHA256 = Digest{} },
	} {
		bad := a
		change(&bad)
		if _, err := bad.JSON(); err == nil {
			t.Errorf("when %s, then it is written", when)
		}
	}
	good := string(payload)
	for when, bad := range map[string]string{
		"it is cut":           good[:len(good)-3],
		"something follows":   good + "{}",
		"a field is unknown":  strings.Replace(good, `"size"`, `"seize"`, 1),
		"it is not an object": "[]",
		"it is too large":     strings.Replace(good, "{", "{"+strings.Repeat(" ", MaxArtifact), 1),
	} {
		if _, err := ParseArtifact([]byte(bad)); err == nil {
			t.Errorf("when %s, then it is read", when)
		}
	}
}

func TestOpenArtifact(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := Artifact{Format: ArtifactFormat, Name: "a", SHA256: Digest{1}}.JSON()
	if err != nil {
		t.Fatal(err)
	}
	sign := func(kind string) []byte {
		e, err := statement.Sign(kind, payload, key)
		if err != nil {
			t.Fatal(err)
		}
		return e.JSON()
	}
	keys := []crypto.PublicKey{key.Public()}
	if a, err := OpenArtifact(sign(ArtifactType), keys); err != nil || a.Name != "a" {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err := OpenArtifact(sign(ManifestType), keys); err == nil {
		t.Error("a statement of another type was taken for an artifact's")
	}
	if _, err := OpenArtifact(sign(ArtifactType), nil); !errors.Is(err, statement.ErrUntrusted) {
		t.Errorf("without keys: %v", err)
	}
	if _, err := OpenArtifact(append(bytes.Repeat([]byte(" "), MaxArtifact), sign(ArtifactType)...), keys); err == nil {
		t.Error("a huge envelope was read")
	}
}

func FuzzParseArtifact(f *testing.F) {
	payload, err := Artifact{Format: ArtifactFormat, Name: "a", SHA256: Digest{1}}.JSON()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload)
	f.Add([]byte(`{"format":"muster/artifact/v1","name":"a","size":-1,"sha256":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseArtifact(b)
		if err != nil {
			return
		}
		again, err := a.JSON()
		if err != nil {
			t.Fatalf("read but not written: %v", err)
		}
		if got, err := ParseArtifact(again); err != nil || got != a {
			t.Fatalf("%+v became %+v, %v", a, got, err)
		}
	})
}
