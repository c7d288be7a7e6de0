package image

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/muster-edge/muster/firmware"
)

// component is one entry of a CycloneDX 1.5 bill of materials.
type component struct {
	Type    string          `json:"type"`
	Name    string          `json:"name"`
	Version string          `json:"version,omitempty"`
	PURL    string          `json:"purl,omitempty"`
	Hashes  []componentHash `json:"hashes,omitempty"`
}

type componentHash struct {
	Algorithm string `json:"alg"`
	Content   string `json:"content"`
}

// bill is the image's bill of materials: every Debian package, every Go module
// of muster-node, kernel, stub, loader and k3s.
func bill(m firmware.Manifest, list []component) ([]byte, error) {
	named := map[string]bool{}
	for _, c := range list {
		named[c.Name] = true
	}
	for _, in := range m.Inputs {
		if !named[in.Name] {
			c := component{Name: in.Name, Version: in.Version, Hashes: hashes(in.SHA256)}
			if in.Name == stubPackage || flavourOf(in.Name) != "" {
				c = debian(Package(in), "amd64")
			}
			list = append(list, c)
		}
	}
	for i := range list {
		list[i].Type = "library"
	}
	slices.SortFunc(list, func(a, b component) int {
		return strings.Compare(a.Name+"\x00"+a.Version, b.Name+"\x00"+b.Version)
	})
	type metadata struct {
		Timestamp string    `json:"timestamp"`
		Component component `json:"component"`
	}
	out, err := json.MarshalIndent(struct {
		Format     string      `json:"bomFormat"`
		Spec       string      `json:"specVersion"`
		Serial     string      `json:"serialNumber"`
		Version    int         `json:"version"`
		Metadata   metadata    `json:"metadata"`
		Components []component `json:"components"`
	}{"CycloneDX", "1.5", "urn:uuid:" + derivedUUID("sbom", m.SHA256).String(), 1,
		metadata{m.Created.Format(time.RFC3339), component{Type: "operating-system", Name: m.Name, Version: m.Version, Hashes: hashes(m.SHA256)}}, list}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("image: write bill of materials: %w", err)
	}
	return append(out, '\n'), nil
}

// derive makes a number for a role out of a digest.
func derive(role string, sum firmware.Digest) [32]byte {
	return sha256.Sum256(append([]byte("muster/slot/v1/"+role+"\x00"), sum[:]...))
}

// derivedUUID is of version 8, which is for UUIDs made by a rule of one's own
// (RFC 9562, 5.8).
func derivedUUID(role string, sum firmware.Digest) (id uuid.UUID) {
	h := derive(role, sum)
	copy(id[:], h[:])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}
