package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-edge/muster/central"
)

// either runs one of two ways to do the same: on the data directory of
// --data while no centre serves from it, else through the API.
func (a *access) either(ctx context.Context, local func(*central.Local) error, remote func(*centre) error) error {
	if a.data != "" && a.config == "" {
		if info, err := os.Stat(a.data); err != nil || !info.IsDir() {
			return exitError{3, fmt.Errorf("there is no data directory %s: `muster serve --data %s` makes it, or `muster ca init --data %s`", a.data, a.data, a.data)}
		}
		l, err := central.OpenLocal(ctx, a.data, time.Now())
		if err == nil {
			return errors.Join(local(l), l.Close())
		}
		if !errors.Is(err, central.ErrRunning) {
			return err
		}
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	return c.explain(remote(c))
}
