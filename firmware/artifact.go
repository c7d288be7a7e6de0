package firmware

import (
	"bytes"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet/statement"
)

const (
	// ArtifactType is the DSSE payload type of an Artifact.
	ArtifactType = "application/vnd.muster.artifact.v1+json"
	// ArtifactFormat is the value of Artifact.Format.
	ArtifactFormat = "muster/artifact/v1"
	// MaxArtifact is the largest envelope of an Artifact, in bytes.
	MaxArtifact = 16 << 10
)

// Artifact says that a file of this name with these bytes was released. It
// says nothing of what the file is: an image is believed by its Manifest, and
// the payload type keeps one from being taken for the other.
type Artifact struct {
	// Format is ArtifactFormat.
	Format string `json:"format"`
	// Name is the file's name without folders. It is signed, so that a sound
	// file cannot be passed off as another one.
	Name string `json:"name"`
	// Size is in bytes; an empty file may be released.
	Size   int64  `json:"size"`
	SHA256 Digest `json:"sha256"`
}

// Validate reports all problems of the statement joined.
func (a Artifact) Validate() error {
	var problems []error
	if a.Format != ArtifactFormat {
		problems = append(problems, fmt.Errorf("format is %.40q, want %q", a.Format, ArtifactFormat))
	}
	if !plainName(a.Name) || !printable(a.Name) {
		problems = append(problems, fmt.Errorf("name %.40q is not a plain file name", a.Name))
	}
	if a.Size < 0 {
		problems = append(problems, fmt.Errorf("size %d is negative", a.Size))
	}
	if a.SHA256.IsZero() {
		problems = append(problems, errors.New("sha256 is zero"))
	}
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("firmware: check artifact: %w", err)
	}
	return nil
}

// printable says whether s can be shown as it is.
func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// JSON returns the payload bytes that are signed. The same statement gives
// the same bytes.
func (a Artifact) JSON() ([]byte, error) {
	if err := a.Validate(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("firmware: write artifact: %w", err)
	}
	return append(b, '\n'), nil
}

// ParseArtifact reads the payload of an envelope whose signature was checked.
// It is as strict as ParseManifest.
func ParseArtifact(payload []byte) (Artifact, error) {
	if len(payload) > MaxArtifact {
		return Artifact{}, fmt.Errorf("firmware: read artifact: %d bytes, more than %d", len(payload), MaxArtifact)
	}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	var a Artifact
	if err := d.Decode(&a); err != nil {
		return Artifact{}, fmt.Errorf("firmware: read artifact: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Artifact{}, errors.New("firmware: read artifact: data after the end")
	}
	if err := a.Validate(); err != nil {
		return Artifact{}, err
	}
	return a, nil
}

// OpenArtifact checks the envelope against the release keys and reads the
// statement in it. The error of an untrusted signature wraps
// statement.ErrUntrusted.
func OpenArtifact(envelope []byte, releaseKeys []crypto.PublicKey) (Artifact, error) {
	if len(envelope) > MaxArtifact {
		return Artifact{}, fmt.Errorf("firmware: open artifact: %d bytes, more than %d", len(envelope), MaxArtifact)
	}
	payload, err := statement.Verify(envelope, ArtifactType, releaseKeys)
	if err != nil {
		return Artifact{}, fmt.Errorf("firmware: open artifact: %w", err)
	}
	return ParseArtifact(payload)
}

// Differs says in what a file of the given name, size and digest is not the
// artifact; nil if it is.
func (a Artifact) Differs(name string, size int64, sum Digest) error {
	var problems []error
	if name != a.Name {
		problems = append(problems, fmt.Errorf("the file's name is %q, %q was signed", name, a.Name))
	}
	if size != a.Size {
		problems = append(problems, fmt.Errorf("the file has %d bytes, %d were signed", size, a.Size))
	}
	if sum != a.SHA256 {
		problems = append(problems, fmt.Errorf("the file's sha256 is %s, %s was signed", sum, a.SHA256))
	}
	return errors.Join(problems...)
}
