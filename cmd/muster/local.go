package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/muster-edge/muster/central"
	"github.com/muster-edge/muster/enroll"
)

// either runs one of two ways to do the same: on the data directory of
// --data while no centre serves from it, else through the API.
func (a *access) either(ctx context.Context, local func(*central.Local) error, remote func(*centre) error) error {
	if a.data != "" && a.config == "" {
		if err := dirExists(a.data); err != nil {
			return err
		}
		l, err := central.OpenLocal(ctx, a.data, time.Now())
		if err == nil {
			return errors.Join(plain(local(l)), l.Close())
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

// dirExists keeps a mistyped data directory from being made.
func dirExists(dir string) error {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return exitError{3, fmt.Errorf("there is no data directory %s: `muster serve --data %s` makes it, or `muster ca init --data %s`", dir, dir, dir)}
	}
	return nil
}

// plain takes the name of the package from what is meant for people.
func plain(err error) error {
	var refused *enroll.Refused
	if errors.As(err, &refused) {
		return errors.New(strings.TrimPrefix(refused.Error(), "enroll: "))
	}
	return err
}
