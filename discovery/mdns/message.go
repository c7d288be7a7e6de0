package mdns

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	hashi "github.com/hashicorp/mdns"
	"github.com/miekg/dns"

	"github.com/muster-edge/muster/discovery"
)

const (
	// maxPacket is the longest message (RFC 6762 §17).
	maxPacket = 9000
	// maxSend keeps what we send in one Ethernet frame, also over IPv6.
	maxSend = 1400
	// maxQuestions and maxRecords bound the parser's work.
	maxQuestions, maxRecords = 32, 128

	headerLen = 12
	// topBit is cache-flush in records (§10.2) and unicast-response in
	// questions (§5.4).
	topBit = 1 << 15
)

const (
	service  = discovery.Service + "." + discovery.Domain + "."
	services = "_services._dns-sd._udp." + discovery.Domain + "."
)

// concerns reports whether a packet can be about us: it must contain, in any
// case, our service's label, the label of service enumeration, or our own.
// Almost all that other programs send ends here, unparsed.
func concerns(b []byte, label string) bool {
	for i := headerLen; i < len(b); i++ {
		for _, want := range []string{"_muster", "_services", label} {
			if int(b[i]) == len(want) && i+1+len(want) <= len(b) && bytes.EqualFold(b[i+1:i+1+len(want)], []byte(want)) {
				return true
			}
		}
	}
	return false
}

func isResponse(b []byte) bool { return len(b) > 2 && b[2]&0x80 != 0 }

// parse unpacks a message, within bounds.
func parse(b []byte) (*dns.Msg, error) {
	if len(b) < headerLen || len(b) > maxPacket {
		return nil, fmt.Errorf("mdns: parse message: %d bytes", len(b))
	}
	count := func(i int) int { return int(b[i])<<8 | int(b[i+1]) }
	if count(4) > maxQuestions || count(6)+count(8)+count(10) > maxRecords {
		return nil, errors.New("mdns: parse message: too many questions or records")
	}
	var m dns.Msg
	if err := m.Unpack(b); err != nil {
		return nil, fmt.Errorf("mdns: parse message: %w", err)
	}
	if m.Opcode != dns.OpcodeQuery || m.Rcode != dns.RcodeSuccess {
		return nil, errors.New("mdns: parse message: not for multicast (RFC 6762 §18.3, §18.11)")
	}
	return &m, nil
}

// advert is one advert of a response.
type advert struct {
	label string
	port  uint16
	tag   discovery.SiteTag
	ttl   time.Duration // 0: goodbye
}

// advertIn returns the first whole advert of a response. A host has one; its
// address is where the packet came from, since address records could point
// anywhere.
func advertIn(m *dns.Msg) (advert, bool) {
	all := append(m.Answer[:len(m.Answer):len(m.Answer)], m.Extra...)
	for _, rr := range all {
		ptr, ok := rr.(*dns.PTR)
		if !ok || ptr.Hdr.Class&^topBit != dns.ClassINET || !strings.EqualFold(ptr.Hdr.Name, service) {
			continue
		}
		label, err := discovery.ParseInstance(ptr.Ptr)
		if err != nil {
			continue
		}
		a := advert{label: label, ttl: min(time.Duration(ptr.Hdr.Ttl)*time.Second, discovery.AdvertTTL)}
		for _, rr := range all {
			if !strings.EqualFold(rr.Header().Name, ptr.Ptr) {
				continue
			}
			switch rr := rr.(type) {
			case *dns.SRV:
				a.port = rr.Port
			case *dns.TXT:
				if tag, err := discovery.ParseTXT(rr.Txt); err == nil {
					a.tag = tag
				}
			}
		}
		if a.port != 0 && a.tag != "" {
			return a, true
		}
	}
	return advert{}, false
}

// zone answers for one link: which records belong to which question is
// hashicorp/mdns's knowledge; lifetimes and cache-flush bits are ours.
type zone struct{ hashi.Zone }

func newZone(label string, port uint16, tag discovery.SiteTag, ips []netip.Addr) (zone, error) {
	var list []net.IP
	for _, ip := range ips {
		list = append(list, ip.AsSlice())
	}
	if len(list) == 0 {
		return zone{}, errors.New("mdns: make zone: no address") // the library would ask the resolver
	}
	z, err := hashi.NewMDNSService(label, discovery.Service, discovery.Domain+".", label+"."+discovery.Domain+".", int(port), list, tag.TXT())
	if err != nil {
		return zone{}, fmt.Errorf("mdns: make zone: %w", err)
	}
	return zone{z}, nil
}

// records answers a question; the library compares names exactly, DNS does
// without case.
func (z zone) records(q dns.Question) []dns.RR {
	q.Name = strings.ToLower(q.Name)
	if c := q.Qclass &^ topBit; c != dns.ClassINET && c != dns.ClassANY {
		return nil
	}
	out := z.Records(q)
	for _, rr := range out {
		h := rr.Header()
		switch h.Rrtype {
		case dns.TypePTR: // shared with other hosts: no cache-flush
			h.Ttl = seconds(discovery.AdvertTTL)
		case dns.TypeTXT:
			h.Ttl = seconds(discovery.AdvertTTL)
			h.Class |= topBit
		default: // §10: what names a host
			h.Ttl = seconds(discovery.HostTTL)
			h.Class |= topBit
		}
	}
	return out
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }

// response makes a response: the first record of each question's answer is the
// answer, what goes with it is additional.
func response(questions []dns.Question, z zone) *dns.Msg {
	m := &dns.Msg{MsgHdr: dns.MsgHdr{Response: true, Authoritative: true}, Compress: true}
	seen := map[string]bool{}
	for _, q := range questions {
		for i, rr := range z.records(q) {
			if id := rr.String(); seen[id] {
				continue
			} else {
				seen[id] = true
			}
			if i == 0 {
				m.Answer = append(m.Answer, rr)
			} else {
				m.Extra = append(m.Extra, rr)
			}
		}
	}
	if len(m.Answer) == 0 {
		return nil
	}
	return m
}

// ourAdvert is the question whose answer is the whole advert.
var ourAdvert = dns.Question{Name: service, Qtype: dns.TypePTR, Qclass: dns.ClassINET}

// pack packs an announcement or an answer.
func pack(m *dns.Msg) ([]byte, error) {
	b, err := m.Pack()
	if err == nil && len(b) > maxSend {
		m.Extra = nil // §6: additional records may be left out
		b, err = m.Pack()
	}
	if err != nil {
		return nil, fmt.Errorf("mdns: pack message: %w", err)
	}
	return b, nil
}

// withdrawal is a goodbye (§10.1): the advert with lifetimes of 0.
func withdrawal(z zone) *dns.Msg {
	m := response([]dns.Question{ourAdvert}, z)
	for _, rr := range append(m.Answer[:len(m.Answer):len(m.Answer)], m.Extra...) {
		rr.Header().Ttl = 0
	}
	return m
}

// legacy turns a response into one for a plain DNS resolver (§6.7).
func legacy(m, query *dns.Msg) {
	m.Id = query.Id
	m.Question = query.Question
	for _, rr := range append(m.Answer[:len(m.Answer):len(m.Answer)], m.Extra...) {
		h := rr.Header()
		h.Ttl = min(h.Ttl, 10)
		h.Class &^= topBit
	}
}

// query asks for all adverts and lists those it knows already (§7.1), as many
// as fit: a host that is left out answers once more than it needs to.
func query(known []known, now time.Time) ([]byte, error) {
	m := &dns.Msg{Compress: true, Question: []dns.Question{ourAdvert}}
	size := headerLen + len(service) + 6
	for _, k := range known {
		left := k.expires.Sub(now)
		if k.disputed || left <= discovery.AdvertTTL/2 {
			continue
		}
		if size += len(k.label) + 16; size > maxSend {
			break
		}
		m.Answer = append(m.Answer, &dns.PTR{
			Hdr: dns.RR_Header{Name: service, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: seconds(left)},
			Ptr: k.label + "." + service,
		})
	}
	b, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("mdns: pack query: %w", err)
	}
	return b, nil
}

// knows reports whether a query lists our advert as known, with at least half
// of its life left (§7.1).
func knows(m *dns.Msg, label string) bool {
	for _, rr := range m.Answer {
		ptr, ok := rr.(*dns.PTR)
		if ok && strings.EqualFold(ptr.Hdr.Name, service) && strings.EqualFold(ptr.Ptr, label+"."+service) &&
			ptr.Hdr.Ttl >= seconds(discovery.AdvertTTL)/2 {
			return true
		}
	}
	return false
}
