package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is our table in family inet. All others are left alone.
const Table = "muster"

// Ports that only admitted nodes may reach: apiserver and supervisor, etcd and
// its metrics, kubelet, embedded registry; tunnels of the pod network.
var (
	tcpPorts = []uint16{6443, 2379, 2380, 2381, 5001, 10250}
	udpPorts = []uint16{8472, 51820, 51821}
)

// The table, in nft's own language:
//
//	table inet muster {
//	  set nodes4 { type ipv4_addr; }   set nodes6 { type ipv6_addr; }
//	  set nets4 { type ipv4_addr; flags interval; }   set nets6 ...
//	  set callers4 { type ipv4_addr; flags dynamic,timeout; size 4096; timeout 2m; }   set callers6 ...
//	  chain guarded {
//	    ip saddr @nodes4 accept; ip6 saddr @nodes6 accept
//	    ip saddr @nets4 accept; ip6 saddr @nets6 accept
//	    counter drop
//	  }
//	  chain input {
//	    type filter hook input priority filter; policy accept
//	    iif lo accept
//	    tcp dport { ... } goto guarded; udp dport { ... } goto guarded
//	    tcp dport 7445 tcp flags & (syn|ack|rst|fin) == syn add @callers4 { ip saddr limit rate over 120/minute burst 60 } drop
//	  }
//	}
//
// There is no connection tracking in it: each packet is judged by where it
// comes from. So a new set of nodes counts at once for connections that exist.

// setSpec is one set with what should be in it.
type setSpec struct {
	set   *nftables.Set
	elems []nftables.SetElement
}

type ruleSpec struct {
	chain string
	exprs []expr.Any
}

// structure is everything in the table but the addresses.
type structure struct {
	table  *nftables.Table
	sets   []*setSpec
	chains []*nftables.Chain
	rules  []ruleSpec
}

const layoutVersion = "muster/firewall/1"

func layout(f Firewall, inSite []netip.Addr) structure {
	if f.PeerPort == 0 {
		f.PeerPort = 7445
	}
	if f.PeerRate == 0 {
		f.PeerRate = 120
	}
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}
	s := structure{table: t}
	accept := nftables.ChainPolicyAccept
	guarded := &nftables.Chain{Name: "guarded", Table: t}
	input := &nftables.Chain{Name: "input", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
		Priority: nftables.ChainPriorityFilter, Policy: &accept}
	s.chains = []*nftables.Chain{guarded, input}

	var n4, n6 []nftables.SetElement
	nodes := slices.Concat(inSite, f.Nodes)
	slices.SortFunc(nodes, netip.Addr.Compare)
	for _, a := range slices.Compact(nodes) {
		if !usable(a) {
			continue
		}
		e := nftables.SetElement{Key: a.WithZone("").AsSlice()}
		if a.Is4() {
			n4 = append(n4, e)
		} else {
			n6 = append(n6, e)
		}
	}
	var i4, i6 []nftables.SetElement
	for _, p := range merged(f.Networks) {
		e := []nftables.SetElement{{Key: p.Addr().AsSlice()}, {Key: after(p), IntervalEnd: true}}
		if p.Addr().Is4() {
			i4 = append(i4, e...)
		} else {
			i6 = append(i6, e...)
		}
	}
	add := func(name string, kt nftables.SetDatatype, interval bool, elems []nftables.SetElement) {
		s.sets = append(s.sets, &setSpec{set: &nftables.Set{Table: t, Name: name, KeyType: kt, Interval: interval}, elems: elems})
	}
	add("nodes4", nftables.TypeIPAddr, false, n4)
	add("nodes6", nftables.TypeIP6Addr, false, n6)
	add("nets4", nftables.TypeIPAddr, true, i4)
	add("nets6", nftables.TypeIP6Addr, true, i6)
	for name, kt := range map[string]nftables.SetDatatype{"callers4": nftables.TypeIPAddr, "callers6": nftables.TypeIP6Addr} {
		// Bounded: when it is full, sources that are not in it are refused.
		s.sets = append(s.sets, &setSpec{set: &nftables.Set{Table: t, Name: name, KeyType: kt, Dynamic: true, HasTimeout: true,
			Timeout: 2 * time.Minute, Size: 4096}})
	}
	slices.SortFunc(s.sets, func(a, b *setSpec) int { return bytes.Compare([]byte(a.set.Name), []byte(b.set.Name)) })

	rule := func(chain string, parts ...[]expr.Any) {
		s.rules = append(s.rules, ruleSpec{chain: chain, exprs: slices.Concat(parts...)})
	}
	verdict := func(k expr.VerdictKind, chain string) []expr.Any {
		return []expr.Any{&expr.Verdict{Kind: k, Chain: chain}}
	}
	for _, v := range []struct {
		set string
		v6  bool
	}{{"nodes4", false}, {"nodes6", true}, {"nets4", false}, {"nets6", true}} {
		rule("guarded", source(v.v6), []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: v.set}}, verdict(expr.VerdictAccept, ""))
	}
	rule("guarded", []expr.Any{&expr.Counter{}}, verdict(expr.VerdictDrop, ""))
	rule("input", []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname("lo")}}, verdict(expr.VerdictAccept, ""))
	for _, p := range tcpPorts {
		rule("input", dport(unix.IPPROTO_TCP, p), verdict(expr.VerdictGoto, "guarded"))
	}
	for _, p := range udpPorts {
		rule("input", dport(unix.IPPROTO_UDP, p), verdict(expr.VerdictGoto, "guarded"))
	}
	for _, v6 := range []bool{false, true} {
		set := "callers4"
		if v6 {
			set = "callers6"
		}
		rule("input", dport(unix.IPPROTO_TCP, f.PeerPort), syn(), source(v6), []expr.Any{&expr.Dynset{
			SrcRegKey: 1, SetName: set, Operation: uint32(unix.NFT_DYNSET_OP_ADD), Timeout: 2 * time.Minute,
			Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(f.PeerRate), Unit: expr.LimitTimeMinute,
				Burst: uint32(max(f.PeerRate/2, 1)), Over: true}}}}, verdict(expr.VerdictDrop, ""))
	}
	return s
}

// source loads the source address of a packet of one IP version.
func source(v6 bool) []expr.Any {
	proto, offset, size := byte(unix.NFPROTO_IPV4), uint32(12), uint32(4)
	if v6 {
		proto, offset, size = unix.NFPROTO_IPV6, 8, 16
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
	}
}

func dport(proto byte, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

// syn matches the first packet of a TCP connection.
func syn() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x17}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}},
	}
}

func ifname(n string) []byte {
	b := make([]byte, 16)
	copy(b, n)
	return b
}

// merged drops networks inside others: intervals may not overlap.
func merged(ps []netip.Prefix) []netip.Prefix {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var out []netip.Prefix
	for _, p := range ps {
		if len(out) == 0 || !out[len(out)-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

// after is the first address behind a network; all zero if there is none.
func after(p netip.Prefix) []byte {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			break
		}
	}
	return b
}

// mark is what a rule of ours carries: its place, and a stand-in for the whole
// layout. A rule that somebody changed or added has another one.
func (s structure) mark(i int) []byte {
	return fmt.Appendf(nil, "%s %d/%d", layoutVersion, i, len(s.rules))
}

// applyFirewall brings the table to what f says, in one transaction.
func applyFirewall(f Firewall, inSite []netip.Addr) error {
	s := layout(f, inSite)
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("hostnet: reach nftables: %w", err)
	}
	defer c.CloseLasting()
	good, err := s.standing(c, f)
	if err != nil {
		return err
	}
	if !good {
		return s.build(c, f)
	}
	return s.fill(c)
}

// standing reports whether sets, chains and rules are there, untouched.
func (s structure) standing(c *nftables.Conn, f Firewall) (bool, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("hostnet: list tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == Table }) {
		return false, nil
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("hostnet: list chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(x *nftables.Chain) bool { return x.Table.Name != Table })
	if len(chains) != len(s.chains) {
		return false, nil
	}
	i := 0
	for _, ch := range s.chains {
		at := slices.IndexFunc(chains, func(x *nftables.Chain) bool { return x.Name == ch.Name })
		if at < 0 || (chains[at].Hooknum == nil) != (ch.Hooknum == nil) {
			return false, nil
		}
		rules, err := c.GetRules(s.table, ch)
		if err != nil {
			return false, fmt.Errorf("hostnet: list rules: %w", err)
		}
		for _, r := range rules {
			if i >= len(s.rules) || s.rules[i].chain != ch.Name || !bytes.Equal(r.UserData, s.note(i, f)) {
				return false, nil
			}
			i++
		}
	}
	if i != len(s.rules) {
		return false, nil
	}
	sets, err := c.GetSets(s.table)
	if err != nil {
		return false, fmt.Errorf("hostnet: list sets: %w", err)
	}
	for _, want := range s.sets {
		if !slices.ContainsFunc(sets, func(x *nftables.Set) bool {
			return x.Name == want.set.Name && x.Interval == want.set.Interval && x.KeyType.Bytes == want.set.KeyType.Bytes
		}) {
			return false, nil
		}
	}
	return true, nil
}

// note is a rule's mark with the settings that are in the rules.
func (s structure) note(i int, f Firewall) []byte {
	b := s.mark(i)
	b = binary.BigEndian.AppendUint16(b, f.PeerPort)
	return binary.BigEndian.AppendUint32(b, uint32(f.PeerRate))
}

// build replaces the whole table; the kernel does it in one step, so that the
// ports are never open in between.
func (s structure) build(c *nftables.Conn, f Firewall) error {
	c.AddTable(s.table) // so that there is one to delete
	c.DelTable(s.table)
	c.AddTable(s.table)
	for _, x := range s.sets {
		if err := c.AddSet(x.set, x.elems); err != nil {
			return fmt.Errorf("hostnet: add set %s: %w", x.set.Name, err)
		}
	}
	for _, ch := range s.chains {
		c.AddChain(ch)
	}
	byName := map[string]*nftables.Chain{}
	for _, ch := range s.chains {
		byName[ch.Name] = ch
	}
	for i, r := range s.rules {
		c.AddRule(&nftables.Rule{Table: s.table, Chain: byName[r.chain], Exprs: r.exprs, UserData: s.note(i, f)})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("hostnet: build firewall: %w", err)
	}
	return nil
}

// fill changes the addresses that differ.
func (s structure) fill(c *nftables.Conn) error {
	changed := false
	for _, x := range s.sets {
		if x.set.Dynamic {
			continue
		}
		have, err := c.GetSetElements(x.set)
		if err != nil {
			return fmt.Errorf("hostnet: list set %s: %w", x.set.Name, err)
		}
		if x.set.Interval {
			// Intervals come back with an open end added; compare by value and
			// replace as a whole, they hardly ever change.
			if !sameElements(dropOpen(have), x.elems) {
				c.FlushSet(x.set)
				if err := c.SetAddElements(x.set, x.elems); err != nil {
					return fmt.Errorf("hostnet: fill set %s: %w", x.set.Name, err)
				}
				changed = true
			}
			continue
		}
		if more := missing(x.elems, have); len(more) > 0 {
			if err := c.SetAddElements(x.set, more); err != nil {
				return fmt.Errorf("hostnet: fill set %s: %w", x.set.Name, err)
			}
			changed = true
		}
		if less := missing(have, x.elems); len(less) > 0 {
			if err := c.SetDeleteElements(x.set, less); err != nil {
				return fmt.Errorf("hostnet: fill set %s: %w", x.set.Name, err)
			}
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("hostnet: change firewall: %w", err)
	}
	return nil
}

// missing are the elements of a that b lacks.
func missing(a, b []nftables.SetElement) []nftables.SetElement {
	key := func(e nftables.SetElement) string {
		if e.IntervalEnd {
			return string(e.Key) + "]"
		}
		return string(e.Key)
	}
	have := make(map[string]bool, len(b))
	for _, x := range b {
		have[key(x)] = true
	}
	var out []nftables.SetElement
	for _, x := range a {
		if !have[key(x)] {
			out = append(out, nftables.SetElement{Key: x.Key, IntervalEnd: x.IntervalEnd})
		}
	}
	return out
}

func sameElements(a, b []nftables.SetElement) bool {
	return len(missing(a, b)) == 0 && len(missing(b, a)) == 0
}

// dropOpen drops the end at address zero that nftables adds to the first
// interval.
func dropOpen(e []nftables.SetElement) []nftables.SetElement {
	return slices.DeleteFunc(slices.Clone(e), func(x nftables.SetElement) bool {
		return x.IntervalEnd && len(bytes.Trim(x.Key, "\x00")) == 0
	})
}

// removeFirewall deletes the table.
func removeFirewall() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("hostnet: reach nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without nftables has no table of ours
	}
	if err != nil {
		return fmt.Errorf("hostnet: list tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == Table {
			c.DelTable(t)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("hostnet: remove firewall: %w", err)
	}
	return nil
}
