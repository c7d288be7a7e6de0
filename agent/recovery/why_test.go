package recovery

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/muster-edge/muster/firmware"
)

// A disk that makes its reader fail, or that answers nothing for ever, keeps no
// machine from calling home; and whoever asks twice hears the same.
func TestWhyNeverKeepsAMachineFromHome(t *testing.T) {
	machineWith := func(why func(func(string) error) Started) *machine {
		m := &machine{cfg: Config{Why: why}, events: make(chan func(), 4), booted: make(chan struct{}), why: make(chan Started, 1)}
		close(m.booted)
		return m
	}
	synctest.Test(t, func(t *testing.T) {
		m := machineWith(func(func(string) error) Started { panic("torn") })
		if err := m.askWhy(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if s := m.whyHere(t.Context()); s.Cause != firmware.CauseNoSystem || !strings.Contains(s.Text, "torn") {
				t.Errorf("%+v", s)
			}
		}
		if len(m.events) != 1 {
			t.Errorf("%d lines for the screen", len(m.events))
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		m = machineWith(func(func(string) error) Started { <-ctx.Done(); return Started{} })
		go func() { _ = m.askWhy(ctx, nil) }()
		if s := m.whyHere(t.Context()); s.Text != "" {
			t.Errorf("%+v", s)
		}
		m = machineWith(nil)
		if err := m.askWhy(t.Context(), nil); err != nil || m.whyHere(t.Context()).Text != "" || len(m.events) != 0 {
			t.Errorf("%v, %d lines", err, len(m.events))
		}
	})
}
