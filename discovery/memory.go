package discovery

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// MemoryFormat names the JSON form of Memory.
const MemoryFormat = "muster/peers/v1"

// maxMemory bounds the JSON that is read back, and maxMemoryList its lists.
const (
	maxMemory     = 1 << 20
	maxMemoryList = 1 << 12
)

// Memory is what the caller writes to disk, so that peers are found after a
// restart on a network that filters multicast. It holds no times: clocks of
// machines without a battery are wrong exactly when this is read.
type Memory struct {
	Format string `json:"format"`
	// Peers has the latest proven first.
	Peers []MemoryPeer `json:"peers"`
}

// MemoryPeer is a node and where it answered, the latest first.
type MemoryPeer struct {
	Node  fleet.NodeID     `json:"node"`
	Addrs []netip.AddrPort `json:"addrs"`
}

// Memory returns what should outlive this run.
func (t *Table) Memory() Memory {
	type aged struct {
		MemoryPeer
		at time.Time
	}
	var list []aged
	for id, n := range t.nodes {
		a := aged{MemoryPeer{Node: id}, n.proven}
		for _, e := range n.addrs {
			a.Addrs = append(a.Addrs, e.addr)
		}
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b aged) int { return cmp.Or(b.at.Compare(a.at), cmp.Compare(a.Node, b.Node)) })
	m := Memory{Format: MemoryFormat, Peers: []MemoryPeer{}}
	for _, a := range list {
		m.Peers = append(m.Peers, a.MemoryPeer)
	}
	return m
}

// ParseMemory reads the JSON of a Memory, of at most 1 MiB. It is strict: a
// file that was damaged should be noticed, and costs no more than a search.
func ParseMemory(b []byte) (Memory, error) {
	if len(b) > maxMemory {
		return Memory{}, fmt.Errorf("discovery: read memory: %d bytes, at most %d", len(b), maxMemory)
	}
	var m Memory
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return Memory{}, fmt.Errorf("discovery: read memory: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Memory{}, errors.New("discovery: read memory: something follows the object")
	}
	if m.Format != MemoryFormat {
		return Memory{}, fmt.Errorf("discovery: read memory: format %q, want %q", clip(m.Format), MemoryFormat)
	}
	if len(m.Peers) > maxMemoryList {
		return Memory{}, fmt.Errorf("discovery: read memory: %d peers, at most %d", len(m.Peers), maxMemoryList)
	}
	for _, p := range m.Peers {
		if err := p.Node.Validate(); err != nil {
			return Memory{}, fmt.Errorf("discovery: read memory: %w", err)
		}
		if len(p.Addrs) > maxMemoryList {
			return Memory{}, fmt.Errorf("discovery: read memory: %d addresses of %s, at most %d", len(p.Addrs), p.Node, maxMemoryList)
		}
		for _, a := range p.Addrs {
			if _, ok := dialable(a, SourceConfigured); !ok {
				return Memory{}, fmt.Errorf("discovery: read memory: %s of %s cannot be dialled", a, p.Node)
			}
		}
	}
	return m, nil
}

// Restore takes back a Memory, up to the table's bounds. Restored peers are
// doubted until they answer.
func (t *Table) Restore(now time.Time, m Memory) {
	now = t.tick(now)
	for _, p := range m.Peers {
		if p.Node.Validate() != nil || (t.nodes[p.Node] == nil && len(t.nodes) >= t.cfg.MaxPeers) {
			continue
		}
		for _, a := range slices.Backward(p.Addrs[:min(len(p.Addrs), t.cfg.MaxAddrs)]) {
			a, ok := dialable(a, SourceConfigured)
			if !ok || (t.nodes[p.Node] != nil && len(t.nodes[p.Node].addrs) >= t.cfg.MaxAddrs) {
				continue
			}
			if e := t.byAddr[a]; e != nil && e.node != "" {
				continue // what is known now is better
			}
			h := Hint{Source: SourceRemembered, Addr: a}
			if o := t.Observe(now, h); o != Added && o != Refreshed {
				continue
			}
			e := t.byAddr[a]
			t.link(e, p.Node)
			e.state = Doubted
		}
	}
}
