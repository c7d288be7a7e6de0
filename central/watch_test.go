package central

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// TestEventGap: who goes on after an event that is not kept any more, or that
// a restored database never had, is told so; everybody else is not.
func TestEventGap(t *testing.T) {
	y := newYard(t)
	gap := func(tenant string, after uint64) string {
		t.Helper()
		why, err := y.s.eventGap(context.Background(), tenant, after)
		y.must(err)
		return why
	}
	last := func() (n uint64) {
		y.must(y.s.store.View(context.Background(), func(t store.Reader) (err error) { n, err = t.LastEvent(DefaultTenant); return err }))
		return n
	}
	y.wants(y.applies(siteDoc("shop-8", `{}`)), "created")
	if why := gap(DefaultTenant, last()); why != "" {
		t.Error(why)
	}
	if why := gap(DefaultTenant, last()+1); !strings.Contains(why, "a backup was restored") {
		t.Errorf("%q", why)
	}
	// Another tenant has numbers of its own.
	if why := gap("other", 5); !strings.Contains(why, "the last one is 0") {
		t.Errorf("%q", why)
	}
	from := last()
	y.update(func(tx store.Tx) error {
		for i := range 20100 { // more than the ring holds
			if _, err := tx.AddEvent(fleet.Event{Tenant: DefaultTenant, Time: y.clock.now(), Kind: "test.event", Text: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		return nil
	})
	if why := gap(DefaultTenant, from); !strings.Contains(why, "is not kept any more") {
		t.Errorf("%q", why)
	}
	if why := gap(DefaultTenant, last()-20000); why != "" {
		t.Errorf("the oldest that is kept: %q", why)
	}
}

// TestObjectEvents: what people change is told to those who watch.
func TestObjectEvents(t *testing.T) {
	y := newYard(t)
	y.wants(y.applies(siteDoc("shop-8", `{}`)), "created")
	y.wants(y.applies(siteDoc("shop-8", `{"title":"x"}`)), "changed")
	if _, err := y.deletes("site", "shop-8", nil); err != nil {
		t.Fatal(err)
	}
	for kind, site := range map[string]string{"site.created": "shop-8", "site.changed": "shop-8", "site.deleted": ""} {
		if e := y.events(kind); len(e) != 1 || e[0].Site != site {
			t.Errorf("%s: %+v", kind, e)
		}
	}
}
