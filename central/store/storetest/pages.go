package storetest

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// pages walks through requests of the same and of different times.
func (s *suite) pages() {
	const n = 25
	s.update(func(tx store.Tx) error {
		for i := range n {
			r := Request("one", fmt.Sprint("tpm", i), "1")
			r.State = fleet.RequestPending
			if i%5 == 0 {
				r.State = fleet.RequestRejected
			}
			r.FirstSeen = Start.Add(time.Duration(i/4) * time.Second)
			if err := tx.AddRequest(r); err != nil {
				return err
			}
		}
		return nil
	})
	pending := fleet.RequestPending
	for _, state := range []*fleet.RequestState{nil, &pending} {
		s.view(func(tx store.Reader) error {
			whole, err := tx.Requests("one", state, 100)
			if err != nil {
				return err
			}
			var got []fleet.Request
			page, err := tx.Requests("one", state, 3)
			for err == nil && len(page) > 0 {
				got = append(got, page...)
				page, err = tx.RequestsAfter("one", state, page[len(page)-1].ID, 3)
			}
			if diff := cmp.Diff(whole, got); diff != "" || len(whole) < n*4/5 {
				s.Errorf("%d requests in pages are not the %d at once: %s", len(got), len(whole), diff)
			}
			return err
		})
	}
	s.view(func(tx store.Reader) error {
		if _, err := tx.RequestsAfter("two", nil, Request("one", "tpm1", "1").ID, 3); !errors.Is(err, store.ErrNotFound) {
			s.Errorf("after a request of another tenant: %v", err)
		}
		return nil
	})
}
