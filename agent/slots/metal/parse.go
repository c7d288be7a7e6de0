package metal

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/muster-edge/muster/fleet"
)

func sum(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }

// parseStack reads the payload of a stack version whose signature was checked.
func parseStack(payload []byte) (fleet.StackVersion, error) {
	var v fleet.StackVersion
	d := json.NewDecoder(bytes.NewReader(payload))
	if err := d.Decode(&v); err != nil {
		return v, fmt.Errorf("metal: read stack version: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return v, errors.New("metal: read stack version: data after the end")
	}
	return v, v.Validate()
}
