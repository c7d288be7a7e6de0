package scenario

import (
	"context"
	"fmt"
)

// makeSite makes the site at the centre with what its charter shall say.
func (s *shop) makeSite(ctx context.Context) error {
	args := []string{"site", "set", site, "--founding", string(s.opts.founding), "--promote-after", "0s", "--reason", "a new site"}
	if _, err := s.c.muster(ctx, append(args, s.opts.policy...)...); err != nil {
		return fmt.Errorf("scenario: make site: %w", err)
	}
	return nil
}
