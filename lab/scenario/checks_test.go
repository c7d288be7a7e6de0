package scenario

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"debug/pe"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

func TestHarmless(t *testing.T) {
	for _, good := range []string{"", "ID  STATE\nr-1 caf\u00e9 <script>\n", "=1+1 {{x}} ${y}\n"} {
		if err := harmless([]byte(good)); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"a\x1bb", "a\tb", "a\rb", "\u009b", "\u202e", "\u200b", "\x7f", "\xff", "x\n <b>second line\n"} {
		if harmless([]byte(bad)) == nil {
			t.Errorf("%q passes", bad)
		}
	}
	for _, s := range injected {
		if harmless([]byte("x"+s)) == nil {
			t.Errorf("%q passes", s)
		}
	}
	if err := harmlessJSON([]byte("{\"a\":[\"x\",1]}\n{\"b\":null}\n")); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{`{"a":"\u001b["}`, `["\u202e"]`, `{"\u0007":1}`, `{"a":"x\ny"}`, `{`} {
		if harmlessJSON([]byte(bad)) == nil {
			t.Errorf("%s passes", bad)
		}
	}
}

func TestHostileFirmwareIsHostile(t *testing.T) {
	s := hostileFirmware()
	all := s.Manufacturer + s.Product + s.Version + s.Serial + s.SKU + s.Family + s.BoardManufacturer + s.BoardProduct + s.BoardVersion + s.BoardSerial + s.BoardAsset
	for _, piece := range append([]string{"\n", "<script>", "{{", "${"}, injected...) {
		if !strings.Contains(all, piece) {
			t.Errorf("%q is looked for and never told", piece)
		}
	}
	h := hostileCleaned
	for _, v := range []string{h.Vendor, h.Product, h.Serial, h.BoardVendor, h.Board, h.BoardSerial} {
		if err := harmless([]byte(v)); err != nil || len(v) > 128 {
			t.Errorf("%q would be accepted: %v", v, err)
		}
	}
}

func TestAuditAgrees(t *testing.T) {
	requests := map[string]fleet.Request{"node1": {ID: "r-1"}}
	rec := func(kind audit.Kind, actor string) fleet.AuditRecord {
		return fleet.AuditRecord{Kind: kind, Object: "request/r-1", Actor: actor}
	}
	filed, approved, issued := rec(audit.RequestFiled, "node:n-1"), rec(audit.RequestApproved, "user:admin"), rec(audit.CertificateIssued, "system")
	for name, c := range map[string]struct {
		records []fleet.AuditRecord
		good    bool
	}{
		"good":            {[]fleet.AuditRecord{filed, approved, issued}, true},
		"nothing":         {nil, false},
		"no certificate":  {[]fleet.AuditRecord{filed, approved}, false},
		"approved twice":  {[]fleet.AuditRecord{filed, approved, approved, issued}, false},
		"filed twice":     {[]fleet.AuditRecord{filed, filed, approved, issued}, false},
		"by a rule":       {[]fleet.AuditRecord{filed, rec(audit.RequestApproved, "rule:x"), issued}, false},
		"superseded":      {[]fleet.AuditRecord{filed, approved, issued, rec(audit.RequestSuperseded, "system")}, false},
		"another machine": {[]fleet.AuditRecord{filed, approved, issued, {Kind: audit.RequestFiled, Object: "request/r-2"}}, false},
	} {
		if err := auditAgrees(c.records, requests); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckAdmission(t *testing.T) {
	key, other := newKey(t), newKey(t)
	const kind = "application/vnd.muster.admission.v1+json"
	ldevid := bytes.Repeat([]byte{7}, 32)
	r := fleet.Request{Tenant: "default", Site: "lab", Node: testNode, FirstSeen: testNow, Evidence: fleet.Evidence{LDevIDKey: ldevid}}
	payload := map[string]any{
		"format": "muster/admission/v1", "tenant": "default", "site": "lab", "node": string(testNode), "incarnation": 1,
		"ldevid_key": hex.EncodeToString(ldevid), "issued": testNow,
	}
	make1 := func(key *ecdsa.PrivateKey, kind, signedKind string, edit map[string]any) []byte {
		t.Helper()
		p := map[string]any{}
		for k, v := range payload {
			p[k] = v
		}
		for k, v := range edit {
			p[k] = v
		}
		body, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(signedKind), signedKind, len(body), body))
		sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(map[string]any{"payloadType": kind, "payload": body, "signatures": []any{map[string]any{"keyid": "x", "sig": sig}}})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := make1(key, kind, kind, nil)
	if err := checkAdmission([][]byte{good}, key.Public(), r, testNow); err != nil {
		t.Fatal(err)
	}
	const charterKind = "application/vnd.muster.charter.v1+json"
	charter := func(key *ecdsa.PrivateKey, site string) []byte {
		return make1(key, charterKind, charterKind, map[string]any{"format": "muster/charter/v1", "site": site})
	}
	if err := checkAdmission([][]byte{charter(key, r.Site), good}, key.Public(), r, testNow); err != nil {
		t.Error("with the charter:", err)
	}
	for name, docs := range map[string][][]byte{
		"none":           {},
		"charter alone":  {charter(key, r.Site)},
		"two charters":   {good, charter(key, r.Site), charter(key, r.Site)},
		"false charter":  {good, charter(other, r.Site)},
		"other charter":  {good, charter(key, "elsewhere")},
		"two":            {good, good},
		"no JSON":        {[]byte("{")},
		"another key":    {make1(other, kind, kind, nil)},
		"another kind":   {make1(key, kind+"x", kind+"x", nil)},
		"kind unsigned":  {make1(key, kind, "x", nil)},
		"another site":   {make1(key, kind, kind, map[string]any{"site": "elsewhere"})},
		"another node":   {make1(key, kind, kind, map[string]any{"node": "n-b"})},
		"another tenant": {make1(key, kind, kind, map[string]any{"tenant": "x"})},
		"another LDevID": {make1(key, kind, kind, map[string]any{"ldevid_key": strings.Repeat("00", 32)})},
		"no incarnation": {make1(key, kind, kind, map[string]any{"incarnation": 0})},
		"long ago":       {make1(key, kind, kind, map[string]any{"issued": testNow.AddDate(0, 0, -1)})},
	} {
		if err := checkAdmission(docs, key.Public(), r, testNow); err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

// A capture as QEMU writes it, of what one machine sends.
type capture struct{ bytes.Buffer }

func newCapture() *capture {
	c := &capture{}
	head := make([]byte, 24)
	binary.LittleEndian.PutUint32(head, 0xa1b2c3d4)
	c.Write(head)
	return c
}

func (c *capture) tcp(to string, from, port uint16, seq uint32, flags byte, data []byte) {
	ip := make([]byte, 40, 40+len(data))
	ip[0], ip[9] = 0x45, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(40+len(data)))
	copy(ip[12:], []byte{10, 77, 0, 100})
	a := netip.MustParseAddr(to).As4()
	copy(ip[16:], a[:])
	binary.BigEndian.PutUint16(ip[20:], from)
	binary.BigEndian.PutUint16(ip[22:], port)
	binary.BigEndian.PutUint32(ip[24:], seq)
	ip[32], ip[33] = 5<<4, flags
	frame := append(make([]byte, 12), 8, 0)
	frame = append(append(frame, ip...), data...)
	record := make([]byte, 16)
	binary.LittleEndian.PutUint32(record[8:], uint32(len(frame)))
	binary.LittleEndian.PutUint32(record[12:], uint32(len(frame)))
	c.Write(record)
	c.Write(frame)
}

func record(kind byte, n int, first byte) []byte {
	b := append([]byte{kind, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...)
	b[5] = first
	return b
}

func TestTCPFlows(t *testing.T) {
	c := newCapture()
	hello, data := record(22, 300, 1), record(23, 2000, 0)
	seq := uint32(0xffffffff - 100) // wraps around
	c.tcp("10.77.0.1", 4000, 7444, seq, 2, nil)
	c.tcp("10.77.0.1", 4000, 7444, seq, 2, nil) // sent again
	c.tcp("10.77.0.1", 4000, 7444, seq+1, 16, hello)
	c.tcp("10.77.0.1", 4000, 7444, seq+1+305+1000, 16, data[1000:]) // out of order
	c.tcp("10.77.0.1", 4000, 7444, seq+1+305, 16, data[:1000])
	c.tcp("10.77.0.1", 4000, 7444, seq+1+305, 16, data[:500])       // sent again
	c.tcp("10.77.0.1", 4000, 7480, seq+1, 16, record(23, 50, 0))    // elsewhere
	c.tcp("10.77.0.9", 4000, 7444, seq+1, 16, record(23, 50, 0))    // elsewhere
	c.tcp("10.77.0.1", 4001, 7444, 77, 16, record(23, 50, 0))       // its beginning is missing
	c.tcp("10.77.0.1", 4000, 7444, 5000, 2, nil)                    // the port again
	c.tcp("10.77.0.1", 4000, 7444, 5001, 16, record(22, 300, 1))    // hello
	c.tcp("10.77.0.1", 4000, 7444, 5001+305, 17, record(23, 19, 0)) // alert
	c.Write([]byte{1, 2, 3})                                        // QEMU is writing
	flows, err := tcpFlows(&c.Buffer, netip.MustParseAddr("10.77.0.1"), 7444)
	if err != nil {
		t.Fatal(err)
	}
	var got []tlsSent
	for _, f := range flows {
		got = append(got, tlsRecords(f.stream()))
	}
	if len(got) != 2 || got[0] != (tlsSent{true, 2000}) || got[1] != (tlsSent{true, 19}) {
		t.Errorf("%+v", got)
	}
	if _, err := tcpFlows(strings.NewReader(strings.Repeat("x", 100)), netip.MustParseAddr("10.77.0.1"), 7444); err == nil {
		t.Error("text passes for a capture")
	}
}

func FuzzTCPFlows(f *testing.F) {
	c := newCapture()
	c.tcp("10.77.0.1", 4000, 7444, 1, 2, nil)
	c.tcp("10.77.0.1", 4000, 7444, 2, 16, record(22, 300, 1))
	f.Add(c.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		flows, err := tcpFlows(bytes.NewReader(b), netip.MustParseAddr("10.77.0.1"), 7444)
		if err != nil {
			return
		}
		for _, fl := range flows {
			if sent := tlsRecords(fl.stream()); sent.data > len(b) {
				t.Fatalf("%d bytes of %d", sent.data, len(b))
			}
		}
	})
}

func TestIdleProgramIsAProgram(t *testing.T) {
	f, err := pe.NewFile(bytes.NewReader(idleProgram()))
	if err != nil {
		t.Fatal(err)
	}
	opt, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok || opt.Subsystem != pe.IMAGE_SUBSYSTEM_EFI_APPLICATION || f.Machine != pe.IMAGE_FILE_MACHINE_AMD64 {
		t.Fatalf("%+v", f.OptionalHeader)
	}
	text := f.Section(".text")
	if text == nil || text.VirtualAddress != opt.AddressOfEntryPoint {
		t.Fatalf("no code at %#x", opt.AddressOfEntryPoint)
	}
	code, err := text.Data()
	if err != nil || !bytes.HasPrefix(code, []byte{0x48, 0xb8}) {
		t.Fatalf("% x (%v)", code, err)
	}
}
