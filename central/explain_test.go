package central

import (
	"context"
	"fmt"
	"strings"
	"testing"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
)

func TestTheQueueExplainsWhoLooksAlikeAndWhereItWasSeen(t *testing.T) {
	h := newHarness(t, t.TempDir())
	file := func(name, serial, mac string) fleet.Request {
		f := servicetest.Filing(name)
		f.Evidence.Serial, f.Evidence.UUID = serial, ""
		f.Evidence.Hardware.NICs = []fleet.NIC{{Name: "eth0", MAC: mac}}
		return h.call(t, f)
	}
	a := file("a", "S1O", "52:54:00:00:00:0A")
	file("b", "S10", "52:54:00:00:00:0b")
	file("c", "other", "52:54:00:00:00:0a")
	file("d", "S1O", "")
	lone := file("e", "nothing like it", "52:54:00:00:00:0e")
	if err := h.store.Update(context.Background(), func(tx store.Tx) error {
		for i := range 10 {
			for kind, mac := range map[string]string{"pxe.offered": "52:54:00:00:00:0a", "pxe.served": "52:54:00:00:00:ff", "request.filed": "52:54:00:00:00:0a"} {
				if _, err := tx.AddEvent(fleet.Event{Tenant: DefaultTenant, Time: h.clock.now(), Kind: kind, MAC: mac, Text: fmt.Sprint("step ", i)}); err != nil {
					return err
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	get := func(r fleet.Request) *musterv1.GetRequestResponse {
		out := &musterv1.GetRequestResponse{}
		if err := h.store.View(context.Background(), func(tx store.Reader) error { return explain(testCaller.part(tx), r, out) }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	out := get(a)
	text := strings.Join(out.LookAlikes, "\n")
	for _, want := range []string{`same serial number "S1O"`, `serial number "S10", which looks like "S1O"`, "same MAC address 52:54:00:00:00:0a"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if len(out.LookAlikes) != 3 || len(out.BootEvents) != explainLines {
		t.Errorf("%d look-alikes, %d events", len(out.LookAlikes), len(out.BootEvents))
	}
	for i, e := range out.BootEvents {
		if e.Kind != "pxe.offered" || e.Text != fmt.Sprint("step ", i+2) {
			t.Errorf("event %d: %s %s", i, e.Kind, e.Text)
		}
	}
	if out := get(lone); len(out.LookAlikes) != 0 || len(out.BootEvents) != 0 {
		t.Errorf("a machine of its own: %+v", out)
	}
}
