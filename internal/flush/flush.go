// Package flush puts names on disk: after a file was made, renamed or removed,
// its directory must be flushed, or a power cut undoes it.
package flush

import (
	"errors"
	"fmt"
	"os"
)

// Dir flushes the names in a directory.
func Dir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("flush directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("flush directory %s: %w", dir, err)
	}
	return nil
}
