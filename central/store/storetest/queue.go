package storetest

import (
	"fmt"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// queue: requests of one state and identity in the order of their coming,
// also those that came in the same moment, page by page.
func (s *suite) queue() {
	var want []fleet.RequestID
	s.update(func(t store.Tx) error {
		for i := range 9 {
			r := Request("one", fmt.Sprint("q", i), "")
			r.Identity, r.FirstSeen = fleet.IdentityHardware, Start.Add(time.Duration(i/3)*time.Second)
			if err := t.AddRequest(r); err != nil {
				return err
			}
		}
		stranger, decided, foreign := Request("one", "stranger", ""), Request("one", "decided", ""), Request("two", "foreign", "")
		decided.Identity, decided.State, foreign.Identity = fleet.IdentityHardware, fleet.RequestApproved, fleet.IdentityHardware
		for _, r := range []fleet.Request{stranger, decided, foreign} {
			if err := t.AddRequest(r); err != nil {
				return err
			}
		}
		return nil
	})
	s.view(func(t store.Reader) error {
		all, err := t.Queue("one", fleet.RequestPending, fleet.IdentityHardware, store.QueueKey{}, 100)
		for i, r := range all {
			want = append(want, r.ID)
			if i > 0 && (r.FirstSeen.Before(all[i-1].FirstSeen) || r.FirstSeen.Equal(all[i-1].FirstSeen) && r.ID <= all[i-1].ID) {
				s.Errorf("place %d: %s of %s after %s of %s", i, r.ID, r.FirstSeen, all[i-1].ID, all[i-1].FirstSeen)
			}
		}
		if err != nil || len(all) != 9 {
			s.Errorf("%d of 9, %v", len(all), err)
		}
		var got []fleet.RequestID
		for after := (store.QueueKey{}); ; {
			page, err := t.Queue("one", fleet.RequestPending, fleet.IdentityHardware, after, 2)
			if err != nil || len(page) == 0 {
				if fmt.Sprint(got) != fmt.Sprint(want) {
					s.Errorf("pages are %v, want %v (%v)", got, want, err)
				}
				break
			}
			for _, r := range page {
				got = append(got, r.ID)
				after = store.QueueKey{FirstSeen: r.FirstSeen, ID: r.ID}
			}
		}
		n, err := t.CountQueue("one", fleet.RequestPending)
		if err != nil || n[fleet.IdentityHardware] != 9 || n[fleet.IdentityUnverified] != 1 || len(n) != 2 {
			s.Errorf("counted %v, %v", n, err)
		}
		return nil
	})
}
