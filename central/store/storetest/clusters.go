package storetest

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
)

// siteWithNodes makes a site and nodes for the tests below.
func (s *suite) siteWithNodes(tenant, site string, names ...string) (nodes []fleet.Node) {
	s.Helper()
	s.update(func(t store.Tx) error {
		if _, err := t.PutSite(Site(tenant, site)); err != nil {
			return err
		}
		for _, n := range names {
			v := Node(tenant, n)
			v.Site = site
			v, err := t.PutNode(v)
			if err != nil {
				return err
			}
			nodes = append(nodes, v)
		}
		return nil
	})
	return nodes
}

func document(tenant, site, kind, name string, n uint64) store.Document {
	return store.Document{
		Tenant: tenant, Kind: kind, Name: name, Site: site, Version: fleet.DocVersion{Epoch: 1, N: n}, At: Start, Envelope: fmt.Appendf(nil, "%s %s %d", kind, name, n),
	}
}

func (s *suite) documentsOfSite() {
	s.siteWithNodes("one", "shop", "a")
	s.siteWithNodes("two", "shop")
	s.update(func(t store.Tx) error {
		for _, d := range []store.Document{
			document("one", "shop", "charter", "shop", 1), document("one", "shop", "admission", "a", 2), document("one", "shop", "admission", "a", 4),
			document("one", "shop", "removal", "a", 3), document("one", "other", "admission", "a", 5), document("two", "shop", "admission", "a", 1),
		} {
			if err := t.AddDocument(d); err != nil {
				return err
			}
		}
		return nil
	})
	numbers := func(tenant string, after fleet.DocVersion, count int) (out []uint64) {
		for _, d := range got(s, func(t store.Reader) ([]store.Document, error) { return t.DocumentsOfSite(tenant, "shop", after, count) }) {
			out = append(out, d.Version.N)
		}
		return out
	}
	for _, c := range []struct {
		tenant string
		after  fleet.DocVersion
		count  int
		want   []uint64
	}{
		{"one", fleet.DocVersion{}, 10, []uint64{1, 3, 4}}, {"one", fleet.DocVersion{Epoch: 1, N: 1}, 10, []uint64{3, 4}},
		{"one", fleet.DocVersion{Epoch: 1, N: 1}, 1, []uint64{3}}, {"one", fleet.DocVersion{Epoch: 2}, 10, nil},
		{"one", fleet.DocVersion{Epoch: 1 << 63, N: 1 << 63}, 10, nil}, {"two", fleet.DocVersion{}, 10, []uint64{1}}, {"three", fleet.DocVersion{}, 10, nil},
	} {
		if d := cmp.Diff(c.want, numbers(c.tenant, c.after, c.count)); d != "" {
			s.Errorf("%s after %s: %s", c.tenant, c.after, d)
		}
	}
	if d := got(s, func(t store.Reader) (store.Document, error) { return t.DocumentOfSite("one", "shop", "admission", "a") }); d.Version.N != 4 {
		s.Errorf("the newest admission at the site is %+v", d)
	}
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.DocumentOfSite("two", "other", "admission", "a")) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddDocument(document("one", "shop", "admission", "a", 4)) })
}

func (s *suite) addresses() {
	nodes := s.siteWithNodes("one", "shop", "a", "b")
	s.siteWithNodes("two", "shop")
	a, b := netip.MustParseAddr("100.96.0.1"), netip.MustParseAddr("255.255.255.254")
	s.update(func(t store.Tx) error { return t.AddAddress("one", "shop", nodes[0].ID, a) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddAddress("one", "shop", nodes[1].ID, a) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddAddress("one", "shop", nodes[0].ID, b) })
	s.want(store.ErrNotFound, func(t store.Tx) error { return t.AddAddress("one", "no-such-site", nodes[0].ID, b) })
	s.update(func(t store.Tx) error { return t.AddAddress("one", "shop", nodes[1].ID, b) })
	s.update(func(t store.Tx) error { return t.AddAddress("two", "shop", nodes[0].ID, a) })
	s.reopen()
	want := map[fleet.NodeID]netip.Addr{nodes[0].ID: a, nodes[1].ID: b}
	if all := got(s, func(t store.Reader) (map[fleet.NodeID]netip.Addr, error) { return t.Addresses("one", "shop") }); len(all) != 2 || all[nodes[0].ID] != a || all[nodes[1].ID] != b {
		s.Errorf("%v, want %v", all, want)
	}
	if one := got(s, func(t store.Reader) (netip.Addr, error) { return t.Address("one", "shop", nodes[1].ID) }); one != b {
		s.Errorf("%s", one)
	}
	s.update(func(t store.Tx) error { return t.DropAddresses("one", "shop") })
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.Address("one", "shop", nodes[0].ID)) })
	if all := got(s, func(t store.Reader) (map[fleet.NodeID]netip.Addr, error) { return t.Addresses("two", "shop") }); len(all) != 1 {
		s.Error("dropping one tenant's addresses dropped another's")
	}
}

func (s *suite) reports() {
	nodes := s.siteWithNodes("one", "shop", "a", "b")
	r := fleet.NodeReport{
		Tenant: "one", Site: "shop", Node: nodes[0].ID, At: Start, UID: "c-1", Epoch: 3, Role: "server", State: "server", Voters: 3,
		Snapshots: []string{"x"}, Labels: map[string]string{"a": "b"}, Charter: fleet.DocVersion{Epoch: 1, N: 2}, Offer: fleet.HexBytes{1}, Offered: []byte("{}"),
	}
	s.update(func(t store.Tx) error { return t.PutReport(r) })
	r.Role = "worker"
	s.update(func(t store.Tx) error { return t.PutReport(r) })
	s.reopen()
	if d := cmp.Diff(r, got(s, func(t store.Reader) (fleet.NodeReport, error) { return t.Report("one", nodes[0].ID) })); d != "" {
		s.Error(d)
	}
	if all := got(s, func(t store.Reader) ([]fleet.NodeReport, error) { return t.Reports("one", "shop") }); len(all) != 1 {
		s.Errorf("%d reports of the site", len(all))
	}
	if all := got(s, func(t store.Reader) ([]fleet.NodeReport, error) { return t.Reports("two", "shop") }); len(all) != 0 {
		s.Error("another tenant sees it")
	}
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.Report("two", nodes[0].ID)) })
	other := r
	other.Tenant = "two"
	s.want(store.ErrNotFound, func(t store.Tx) error { return t.PutReport(other) })
	s.update(func(t store.Tx) error { return t.DropReport("one", nodes[0].ID) })
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.Report("one", nodes[0].ID)) })
}

func (s *suite) orders() {
	nodes := s.siteWithNodes("one", "shop", "a", "b")
	order := func(id string, n uint64, node fleet.NodeID) store.Order {
		return store.Order{IssuedOrder: fleet.IssuedOrder{
			Order: fleet.Order{
				ID: id, Tenant: "one", Site: "shop", Node: node, Kind: fleet.OrderReset, Cluster: "c-1", Epoch: 2, Version: fleet.DocVersion{Epoch: 1, N: n},
				Issued: Start, NotAfter: Start.Add(time.Hour),
			}, By: "user:x", Changed: Start,
		}, Envelope: []byte("{}")}
	}
	first := order("o-a", 1, nodes[0].ID)
	s.update(func(t store.Tx) error { return t.AddOrder(first) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddOrder(first) })
	s.update(func(t store.Tx) error { return t.AddOrder(order("o-b", 2, nodes[1].ID)) })
	first.Revision = 1
	if d := cmp.Diff(first, got(s, func(t store.Reader) (store.Order, error) { return t.Order("one", "o-a") })); d != "" {
		s.Error(d)
	}
	ids := func(read func(store.Reader) ([]store.Order, error)) (out []string) {
		for _, o := range got(s, read) {
			out = append(out, o.ID)
		}
		return out
	}
	check := func(name string, read func(store.Reader) ([]store.Order, error), want ...string) {
		s.Helper()
		if d := cmp.Diff(want, ids(read)); d != "" {
			s.Errorf("%s: %s", name, d)
		}
	}
	check("all, newest first", func(t store.Reader) ([]store.Order, error) { return t.Orders("one", "", 10) }, "o-b", "o-a")
	check("of the site", func(t store.Reader) ([]store.Order, error) { return t.Orders("one", "shop", 1) }, "o-b")
	check("of another tenant", func(t store.Reader) ([]store.Order, error) { return t.Orders("two", "shop", 10) })
	check("open, of a node", func(t store.Reader) ([]store.Order, error) { return t.OpenOrders("one", "shop", nodes[0].ID, 10) }, "o-a")
	check("open, of another tenant", func(t store.Reader) ([]store.Order, error) { return t.OpenOrders("two", "shop", nodes[0].ID, 10) })
	check("open, of the site", func(t store.Reader) ([]store.Order, error) { return t.OpenOrders("one", "shop", "", 10) }, "o-a", "o-b")
	check("ended before their end", func(t store.Reader) ([]store.Order, error) { return t.EndedOrders("one", Start, 10) })
	check("ended", func(t store.Reader) ([]store.Order, error) { return t.EndedOrders("one", Start.Add(time.Hour), 10) }, "o-a", "o-b")
	v := first.IssuedOrder
	v.State = fleet.OrderRunning
	s.update(func(t store.Tx) (err error) { v, err = t.PutOrder(v); return err })
	s.want(store.ErrConflict, func(t store.Tx) error { return failed(t.PutOrder(first.IssuedOrder)) })
	other := v
	other.Tenant = "two"
	s.want(store.ErrConflict, func(t store.Tx) error { return failed(t.PutOrder(other)) })
	check("what runs does not end", func(t store.Reader) ([]store.Order, error) { return t.EndedOrders("one", Start.Add(time.Hour), 10) }, "o-b")
	v.State = fleet.OrderDone
	s.update(func(t store.Tx) (err error) { v, err = t.PutOrder(v); return err })
	check("done is not open", func(t store.Reader) ([]store.Order, error) { return t.OpenOrders("one", "shop", "", 10) }, "o-b")
	if found := got(s, func(t store.Reader) ([]string, error) { return t.FindOrders("one", "o-", 10) }); len(found) != 2 {
		s.Errorf("found %v", found)
	}
	if found := got(s, func(t store.Reader) ([]string, error) { return t.FindOrders("two", "o-", 10) }); len(found) != 0 {
		s.Errorf("another tenant found %v", found)
	}
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.Order("two", "o-a")) })
}

func (s *suite) escrow() {
	nodes := s.siteWithNodes("one", "shop", "a")
	s.siteWithNodes("two", "shop")
	blob := func(id string, at time.Time) fleet.EscrowBlob {
		return fleet.EscrowBlob{Tenant: "one", Site: "shop", ID: id, SHA256: fleet.HexBytes{1}, Size: 5, Node: nodes[0].ID, Cluster: "c-1", Epoch: 1, Taken: Start, Stored: at, KeyID: "k"}
	}
	a, b := blob("e-a", Start), blob("e-b", Start.Add(time.Second))
	s.update(func(t store.Tx) error { return t.AddEscrow(a) })
	s.update(func(t store.Tx) error { return t.AddEscrow(b) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddEscrow(a) })
	s.reopen()
	if d := cmp.Diff(a, got(s, func(t store.Reader) (fleet.EscrowBlob, error) { return t.Escrow("one", "e-a") })); d != "" {
		s.Error(d)
	}
	if d := cmp.Diff([]fleet.EscrowBlob{b, a}, got(s, func(t store.Reader) ([]fleet.EscrowBlob, error) { return t.EscrowOfSite("one", "shop", 10) })); d != "" {
		s.Error(d)
	}
	if all := got(s, func(t store.Reader) ([]fleet.EscrowBlob, error) { return t.EscrowAfter("one", "e-a", 10) }); len(all) != 1 || all[0].ID != "e-b" {
		s.Errorf("%+v", all)
	}
	for _, read := range []func(store.Reader) ([]fleet.EscrowBlob, error){
		func(t store.Reader) ([]fleet.EscrowBlob, error) { return t.EscrowOfSite("two", "shop", 10) },
		func(t store.Reader) ([]fleet.EscrowBlob, error) { return t.EscrowAfter("two", "", 10) },
	} {
		if all := got(s, read); len(all) != 0 {
			s.Errorf("another tenant sees %+v", all)
		}
	}
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.Escrow("two", "e-a")) })
	s.update(func(t store.Tx) error { return t.DropEscrow("two", "e-a") })
	s.update(func(t store.Tx) error { return t.DropEscrow("one", "e-b") })
	if all := got(s, func(t store.Reader) ([]fleet.EscrowBlob, error) { return t.EscrowAfter("one", "", 10) }); len(all) != 1 || all[0].ID != "e-a" {
		s.Errorf("after dropping: %+v", all)
	}
}

func (s *suite) nodesOfSite() {
	nodes := s.siteWithNodes("one", "shop", "a", "b", "c")
	s.siteWithNodes("one", "other", "d")
	if all := got(s, func(t store.Reader) ([]fleet.Node, error) { return t.NodesOfSite("one", "shop", "", 10) }); len(all) != 3 {
		s.Errorf("%d nodes", len(all))
	}
	if all := got(s, func(t store.Reader) ([]fleet.Node, error) { return t.NodesOfSite("two", "shop", "", 10) }); len(all) != 0 {
		s.Errorf("another tenant sees %d nodes", len(all))
	}
	found := got(s, func(t store.Reader) (fleet.Node, error) { return t.NodeByKey("one", nodes[1].LDevIDKey) })
	if string(found.LDevIDKey) != string(nodes[1].LDevIDKey) {
		s.Errorf("%+v", found)
	}
	s.want(store.ErrNotFound, func(t store.Tx) error { return failed(t.NodeByKey("two", nodes[1].LDevIDKey)) })
}

func (s *suite) epochs() {
	first := got(s, func(t store.Reader) (uint64, error) { return t.Epoch() })
	var raised uint64
	var v fleet.DocVersion
	s.update(func(t store.Tx) (err error) { v, err = t.NextVersion(); return err })
	s.update(func(t store.Tx) (err error) { raised, err = t.RaiseEpoch(); return err })
	s.reopen()
	if now := got(s, func(t store.Reader) (uint64, error) { return t.Epoch() }); raised != first+1 || now != raised {
		s.Errorf("epoch %d, %d, %d", first, raised, now)
	}
	s.update(func(t store.Tx) error {
		w, err := t.NextVersion()
		if w.Compare(v) <= 0 || w.Epoch != raised {
			s.Errorf("%s after %s", w, v)
		}
		return err
	})
}
