package service_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/enroll/service"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// claims is a Store that remembers the claim codes that came.
type claims struct {
	service.Store
	mu  sync.Mutex
	got []string
}

func (c *claims) File(ctx context.Context, f enroll.Filing) (fleet.Request, error) {
	c.mu.Lock()
	c.got = append(c.got, f.Claim)
	c.mu.Unlock()
	return c.Store.File(ctx, f)
}

func (c *claims) all() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.got, ",")
}

func TestAClaimCodeReachesTheStore(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	for code, want := range map[string]string{"": "", "7K3MW-X": "7K3MW-X", strings.Repeat("A", enroll.MaxClaim+1): "", "\xff": ""} {
		store := &claims{}
		c := newCentre(t, options{roots: m.tpm.CA, config: func(cfg *service.Config) { store.Store, cfg.Store = cfg.Store, store }})
		run := c.enroll(t.Context(), t, m, func(cfg *client.Config) { cfg.Site.Claim = code })
		run.until(t, "waiting", waits)
		run.stop()
		if got := store.all(); got != want {
			t.Errorf("sent %q, the store got %q", code, got)
		}
	}
}

// A code is the machine's own: it is bound by the transcript, so that nobody
// in between, and no other program on the machine's connection, can add,
// change or take it.
func TestAClaimCodeIsBoundByTheProof(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	for name, row := range map[string]struct{ bound, sent, want string }{
		"as it is": {"7K3MW", "7K3MW", ""},
		"none":     {"", "", ""},
		"added":    {"", "7K3MW", "not-proven"},
		"taken":    {"7K3MW", "", "not-proven"},
		"changed":  {"7K3MW", "7K3MV", "not-proven"},
		"too long": {strings.Repeat("A", 65), strings.Repeat("A", 65), "bad-request"},
	} {
		t.Run(name, func(t *testing.T) {
			store := &claims{}
			c := newCentre(t, options{roots: m.tpm.CA, config: func(cfg *service.Config) { store.Store, cfg.Store = cfg.Store, store }})
			w := c.dial(t)
			a := w.begin(t, m)
			a.fields.Claim = []byte(row.bound)
			a.edit = func(q *musterv1.CompleteRequest) { q.Claim = row.sent }
			_, err := w.complete(t, a)
			switch row.want {
			case "":
				must(t, err)
				if got := store.all(); got != row.sent {
					t.Errorf("the store got %q", got)
				}
			case "bad-request":
				refused(t, err, connect.CodeInvalidArgument, row.want)
			default:
				refused(t, err, connect.CodePermissionDenied, row.want)
			}
			if row.want != "" && store.all() != "" {
				t.Errorf("the store got %q", store.all())
			}
		})
	}
}
