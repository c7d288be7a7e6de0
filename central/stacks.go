package central

import (
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// versionOf reads a stack version that was published: its signature was
// checked then.
func versionOf(v store.StackVersion) (out fleet.StackVersion, err error) {
	if err := said(v.Envelope, &out); err != nil {
		return out, fmt.Errorf("central: read stack version %s@%s: %w", v.Stack, v.Version, err)
	}
	return out, nil
}
