package central

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
)

// TestExpired: a node that was away for a hundred days is turned away where a
// certificate is asked for, told what to do, and served without a person when
// it does that, whatever the clocks say.
func TestExpired(t *testing.T) {
	r, clock := timed(t, t.TempDir())
	b := newBox(t, r, nil)
	id := b.admit(t)
	request := id.Request
	for _, c := range []struct {
		name string
		// machine is how far off its clock is.
		machine time.Duration
	}{
		{"when its clock is right then it is served", 0},
		{"when its clock is at 1970 then it is served", -clock.now().Add(400 * day).Sub(time.Unix(0, 0))},
		{"when its clock is ten years ahead then it is served", 10 * 365 * day},
	} {
		t.Run(c.name, func(t *testing.T) {
			clock.set(clock.now().Add(100 * day))
			b.clock.Store(int64(c.machine))
			err := b.report(id)
			if connect.CodeOf(err) != connect.CodeUnauthenticated || !strings.Contains(err.Error(), "ended on") || !strings.Contains(err.Error(), "enroll again") {
				t.Errorf("a report by an expired certificate: %v", err)
			}
			if _, err := b.client.Renew(t.Context(), id); !errors.Is(err, client.ErrEnroll) || !strings.Contains(err.Error(), "ended on") {
				t.Errorf("a renewal by an expired certificate: %v", err)
			}
			next, err := b.enroll(t)
			if err != nil {
				t.Fatal(err)
			}
			if next.Request != request || b.live(t).State != fleet.RequestIssued {
				t.Errorf("request %s, want %s as before", next.Request, request)
			}
			if leaf := leafOf(t, next); leaf.NotAfter.Before(clock.now().Add(29*day)) || bytes.Equal(next.Certificates[0], id.Certificates[0]) {
				t.Errorf("the new certificate ends %s", leaf.NotAfter)
			}
			if err := b.report(next); err != nil {
				t.Errorf("a report by the new certificate: %v", err)
			}
			id = next
		})
	}
	b.clock.Store(0)

	t.Run("when the centre's clock falls behind then nobody is locked out", func(t *testing.T) {
		now := clock.now()
		clock.set(now.Add(-200 * day))
		if err := b.report(id); err != nil {
			t.Errorf("a certificate from the future: %v", err)
		}
		again, err := b.enroll(t)
		if err != nil || !bytes.Equal(again.Certificates[0], id.Certificates[0]) {
			t.Errorf("enrolling: %v", err)
		}
		// Before its CA was made the centre signs nothing; nothing is lost.
		clock.set(time.Unix(0, 0))
		if err := b.report(id); err != nil {
			t.Errorf("a report in 1970: %v", err)
		}
		clock.set(now)
		if err := b.report(id); err != nil {
			t.Error(err)
		}
	})

	t.Run("when the centre's clock is beyond its CA's end then nothing is issued", func(t *testing.T) {
		now := clock.now()
		clock.set(now.Add(4 * 365 * day))
		if got, err := b.enroll(t); err == nil {
			t.Errorf("issued until %s", leafOf(t, got).NotAfter)
		}
		clock.set(now)
		if err := b.report(id); err != nil {
			t.Errorf("after the clock was set right: %v", err)
		}
	})

	t.Run("when it is denied then it gets nothing on either way", func(t *testing.T) {
		if err := r.Deny(id.Node); err != nil {
			t.Fatal(err)
		}
		for what, at := range map[string]time.Time{"fresh": clock.now(), "expired": clock.now().Add(100 * day)} {
			clock.set(at)
			if err := b.report(id); err == nil {
				t.Errorf("%s: a report", what)
			}
			if _, err := b.client.Renew(t.Context(), id); !errors.Is(err, client.ErrEnroll) {
				t.Errorf("%s: a renewal: %v", what, err)
			}
			if _, err := b.enroll(t); err == nil || !strings.Contains(err.Error(), "not wanted") {
				t.Errorf("%s: enrolling: %v", what, err)
			}
		}
	})
	r.sound(t)
}
