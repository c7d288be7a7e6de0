package central

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// hardware gives an issued node what its machine proves to have now. A
// machine that comes back with another disk or another card is the same node
// with the same evidence: nobody approves it again, but what is ordered for its
// disks, whom the boot host knows by its card, and the labels of its admission
// must follow. ok: something has changed.
func (e *enrollment) hardware(t store.Tx, by act, r fleet.Request) (n fleet.Node, ok bool, err error) {
	if r.State != fleet.RequestIssued {
		return n, false, nil
	}
	was, err := t.Node(r.Tenant, r.Node)
	if errors.Is(err, store.ErrNotFound) {
		return n, false, nil
	}
	if err != nil || was.Request != r.ID || reflect.DeepEqual(was.Hardware, r.Evidence.Hardware) {
		return n, false, err
	}
	n = was
	n.Hardware = r.Evidence.Hardware
	if e.scribe != nil && n.Admitted() {
		if _, err := e.scribe.settle(t, by, was, &n); err != nil {
			return n, false, fmt.Errorf("central: settle node %s with other hardware: %w", n.ID, err)
		}
	}
	if n, err = t.PutNode(n); err != nil {
		return n, false, err
	}
	if reflect.DeepEqual(was.Hardware.Disks, n.Hardware.Disks) {
		return n, true, nil
	}
	_, err = t.AddEvent(cleanEvent(fleet.Event{
		Tenant: n.Tenant, Time: by.now, Kind: "node.disks", Node: n.ID, Site: n.Site, MAC: macOf(n.Hardware),
		Text: fmt.Sprintf("%s has %d disks now, and had %d or others before", n.Words, len(n.Hardware.Disks), len(was.Hardware.Disks)),
	}))
	return n, true, err
}
