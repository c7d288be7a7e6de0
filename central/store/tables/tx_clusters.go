package tables

import (
	"encoding/binary"
	"math"
	"net/netip"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func documentOf(r db.Document) (store.Document, error) {
	return store.Document{
		Tenant: r.Tenant, Kind: r.Kind, Name: r.Name, Site: r.Site, At: clock(r.At), Envelope: []byte(r.Envelope),
		Version: fleet.DocVersion{Epoch: uint64(r.Epoch), N: uint64(r.Version)},
	}, nil
}

func (t *tx) Document(tenant, kind, name string) (store.Document, error) {
	r, err := t.q.LatestDocument(t.ctx, db.LatestDocumentParams{Tenant: tenant, Kind: kind, Name: name})
	if err != nil {
		return store.Document{}, wrap("read", "document", err)
	}
	return documentOf(r)
}

func (t *tx) DocumentOfSite(tenant, site, kind, name string) (store.Document, error) {
	r, err := t.q.DocumentOfSite(t.ctx, db.DocumentOfSiteParams{Tenant: tenant, Kind: kind, Name: name, Site: site})
	if err != nil {
		return store.Document{}, wrap("read", "document", err)
	}
	return documentOf(r)
}

// whole is a version number as the database keeps it. Numbers from outside
// may be greater than any that was given out.
func whole(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

func (t *tx) DocumentsOfSite(tenant, site string, after fleet.DocVersion, count int) ([]store.Document, error) {
	rows, err := t.q.ListDocumentsOfSite(t.ctx, db.ListDocumentsOfSiteParams{
		Tenant: tenant, Site: site, Epoch: whole(after.Epoch), Version: whole(after.N), Count: int64(count),
	})
	return list(rows, err, "documents", documentOf)
}

func (t *tx) AddDocument(d store.Document) error {
	if d.Site != "" {
		if err := t.q.ReplaceDocuments(t.ctx, db.ReplaceDocumentsParams{Tenant: d.Tenant, Kind: d.Kind, Name: d.Name, Site: d.Site}); err != nil {
			return wrap("replace", "documents", err)
		}
	}
	return wrap("write", "document", t.q.InsertDocument(t.ctx, db.InsertDocumentParams{
		Tenant: d.Tenant, Kind: d.Kind, Name: d.Name, Epoch: int64(d.Version.Epoch), Version: int64(d.Version.N),
		At: stamp(d.At), Envelope: string(d.Envelope), Site: d.Site,
	}))
}

func (t *tx) NodesOfSite(tenant, site string, after fleet.NodeID, count int) ([]fleet.Node, error) {
	rows, err := t.q.ListNodesOfSite(t.ctx, db.ListNodesOfSiteParams{Tenant: tenant, Site: site, After: string(after), Count: int64(count)})
	return list(rows, err, "nodes", nodeOf)
}

func (t *tx) NodeByKey(tenant string, key fleet.HexBytes) (fleet.Node, error) {
	r, err := t.q.NodeByKey(t.ctx, db.NodeByKeyParams{Tenant: tenant, LdevidKey: key.String()})
	if err != nil {
		return fleet.Node{}, wrap("read", "node", err)
	}
	return nodeOf(r)
}

// Addresses are kept as numbers, since they are counted and compared.
func addressOf(n int64) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	return netip.AddrFrom4(b)
}

func addressNumber(a netip.Addr) int64 {
	b := a.As4()
	return int64(binary.BigEndian.Uint32(b[:]))
}

func (t *tx) Address(tenant, site string, node fleet.NodeID) (netip.Addr, error) {
	n, err := t.q.GetAddress(t.ctx, db.GetAddressParams{Tenant: tenant, Site: site, Node: string(node)})
	if err != nil {
		return netip.Addr{}, wrap("read", "address", err)
	}
	return addressOf(n), nil
}

func (t *tx) Addresses(tenant, site string) (map[fleet.NodeID]netip.Addr, error) {
	rows, err := t.q.ListAddresses(t.ctx, db.ListAddressesParams{Tenant: tenant, Site: site})
	if err != nil {
		return nil, wrap("list", "addresses", err)
	}
	out := make(map[fleet.NodeID]netip.Addr, len(rows))
	for _, r := range rows {
		out[fleet.NodeID(r.Node)] = addressOf(r.Address)
	}
	return out, nil
}

func (t *tx) AddAddress(tenant, site string, node fleet.NodeID, a netip.Addr) error {
	return wrap("write", "address", t.q.InsertAddress(t.ctx, db.InsertAddressParams{
		Tenant: tenant, Site: site, Node: string(node), Address: addressNumber(a),
	}))
}

func (t *tx) DropAddresses(tenant, site string) error {
	return wrap("delete", "addresses", t.q.DeleteAddresses(t.ctx, db.DeleteAddressesParams{Tenant: tenant, Site: site}))
}

func reportOf(r db.Report) (fleet.NodeReport, error) {
	var v fleet.NodeReport
	err := decode("report", r.Body, &v)
	return v, err
}

func (t *tx) Report(tenant string, node fleet.NodeID) (fleet.NodeReport, error) {
	r, err := t.q.GetReport(t.ctx, db.GetReportParams{Tenant: tenant, Node: string(node)})
	if err != nil {
		return fleet.NodeReport{}, wrap("read", "report", err)
	}
	return reportOf(r)
}

func (t *tx) Reports(tenant, site string) ([]fleet.NodeReport, error) {
	rows, err := t.q.ListReports(t.ctx, db.ListReportsParams{Tenant: tenant, Site: site})
	return list(rows, err, "reports", reportOf)
}

func (t *tx) PutReport(v fleet.NodeReport) error {
	body, err := encode("report", v)
	if err != nil {
		return err
	}
	return wrap("write", "report", t.q.PutReport(t.ctx, db.PutReportParams{Tenant: v.Tenant, Node: string(v.Node), Site: v.Site, Body: body}))
}

func (t *tx) DropReport(tenant string, node fleet.NodeID) error {
	return wrap("delete", "report", t.q.DeleteReport(t.ctx, db.DeleteReportParams{Tenant: tenant, Node: string(node)}))
}

func orderOf(r db.Order) (store.Order, error) {
	var v fleet.IssuedOrder
	err := decode("order", r.Body, &v)
	v.Revision = r.Revision
	return store.Order{IssuedOrder: v, Envelope: []byte(r.Envelope)}, err
}

func (t *tx) Order(tenant, id string) (store.Order, error) {
	r, err := t.q.GetOrder(t.ctx, db.GetOrderParams{Tenant: tenant, ID: id})
	if err != nil {
		return store.Order{}, wrap("read", "order", err)
	}
	return orderOf(r)
}

func (t *tx) FindOrders(tenant, prefix string, count int) ([]string, error) {
	ids, err := t.q.FindOrders(t.ctx, db.FindOrdersParams{Tenant: tenant, Low: prefix, High: beyond(prefix), Count: int64(count)})
	return ids, wrap("list", "orders", err)
}

func (t *tx) Orders(tenant, site string, count int) ([]store.Order, error) {
	if site == "" {
		rows, err := t.q.ListOrders(t.ctx, db.ListOrdersParams{Tenant: tenant, Count: int64(count)})
		return list(rows, err, "orders", orderOf)
	}
	rows, err := t.q.ListOrdersOfSite(t.ctx, db.ListOrdersOfSiteParams{Tenant: tenant, Site: site, Count: int64(count)})
	return list(rows, err, "orders", orderOf)
}

func (t *tx) OpenOrders(tenant, site string, node fleet.NodeID, count int) ([]store.Order, error) {
	if node == "" {
		rows, err := t.q.ListOpenOrdersOfSite(t.ctx, db.ListOpenOrdersOfSiteParams{Tenant: tenant, Site: site, Count: int64(count)})
		return list(rows, err, "orders", orderOf)
	}
	rows, err := t.q.ListOpenOrdersOfNode(t.ctx, db.ListOpenOrdersOfNodeParams{Tenant: tenant, Node: string(node), Count: int64(count)})
	return list(rows, err, "orders", orderOf)
}

func (t *tx) EndedOrders(tenant string, at time.Time, count int) ([]store.Order, error) {
	rows, err := t.q.ListEndedOrders(t.ctx, db.ListEndedOrdersParams{Tenant: tenant, At: stamp(at), Count: int64(count)})
	return list(rows, err, "orders", orderOf)
}

func (t *tx) AddOrder(o store.Order) error {
	o.Revision = 1
	body, err := encode("order", o.IssuedOrder)
	if err != nil {
		return err
	}
	return wrap("write", "order", t.q.InsertOrder(t.ctx, db.InsertOrderParams{
		Tenant: o.Tenant, ID: o.ID, Site: o.Site, Node: string(o.Node), State: o.State.String(), Epoch: int64(o.Version.Epoch),
		Version: int64(o.Version.N), Ends: stamp(o.NotAfter), Body: body, Envelope: string(o.Envelope),
	}))
}

func (t *tx) PutOrder(v fleet.IssuedOrder) (fleet.IssuedOrder, error) {
	seen := v.Revision
	v.Revision++
	body, err := encode("order", v)
	if err != nil {
		return v, err
	}
	n, err := t.q.UpdateOrder(t.ctx, db.UpdateOrderParams{Tenant: v.Tenant, ID: v.ID, State: v.State.String(), Body: body, Seen: seen})
	return v, replaced("order", n, err)
}

func escrowOf(r db.Escrow) (fleet.EscrowBlob, error) {
	var v fleet.EscrowBlob
	err := decode("escrow", r.Body, &v)
	return v, err
}

func (t *tx) Escrow(tenant, id string) (fleet.EscrowBlob, error) {
	r, err := t.q.GetEscrow(t.ctx, db.GetEscrowParams{Tenant: tenant, ID: id})
	if err != nil {
		return fleet.EscrowBlob{}, wrap("read", "escrow", err)
	}
	return escrowOf(r)
}

func (t *tx) EscrowOfSite(tenant, site string, count int) ([]fleet.EscrowBlob, error) {
	rows, err := t.q.ListEscrow(t.ctx, db.ListEscrowParams{Tenant: tenant, Site: site, Count: int64(count)})
	return list(rows, err, "escrow", escrowOf)
}

func (t *tx) EscrowAfter(tenant, after string, count int) ([]fleet.EscrowBlob, error) {
	rows, err := t.q.ListEscrowOfTenant(t.ctx, db.ListEscrowOfTenantParams{Tenant: tenant, After: after, Count: int64(count)})
	return list(rows, err, "escrow", escrowOf)
}

func (t *tx) AddEscrow(b fleet.EscrowBlob) error {
	body, err := encode("escrow", b)
	if err != nil {
		return err
	}
	return wrap("write", "escrow", t.q.InsertEscrow(t.ctx, db.InsertEscrowParams{
		Tenant: b.Tenant, ID: b.ID, Site: b.Site, Node: string(b.Node), Size: b.Size, Stored: stamp(b.Stored), Body: body,
	}))
}

func (t *tx) DropEscrow(tenant, id string) error {
	return wrap("delete", "escrow", t.q.DeleteEscrow(t.ctx, db.DeleteEscrowParams{Tenant: tenant, ID: id}))
}
