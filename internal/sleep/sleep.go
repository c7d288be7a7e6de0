// Package sleep waits for a time or for the end of a context, whichever comes
// first.
package sleep

import (
	"context"
	"time"
)

// For returns nil after d, or the reason why ctx ended before.
func For(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
