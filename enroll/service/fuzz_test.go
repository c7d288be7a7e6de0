package service

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet/text"
)

var fuzzKeys = []Key{{ID: 1, Secret: [32]byte{1}}, {ID: 2, Secret: [32]byte{2}}}

// FuzzOpenSealed: nothing that we did not seal opens, nothing panics.
func FuzzOpenSealed(f *testing.F) {
	c := cookie{begun: time.Unix(1, 0), expires: time.Unix(2, 0), tenant: "default", begin: []byte("x")}
	good, _ := seal(fuzzKeys, cookieDomain, c.encode())
	f.Add(good[:len(good)-1])
	f.Add([]byte{})
	f.Add(make([]byte, sealHeader+sealNonce))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, domain := range []string{cookieDomain, ticketDomain} {
			if _, err := open(fuzzKeys, domain, b); err == nil {
				t.Fatalf("opened %x", b)
			}
		}
		if _, err := openCookie(fuzzKeys, b, time.Unix(1, 0), connection{}, "default"); err == nil {
			t.Fatal("a cookie was opened")
		}
	})
}

// FuzzDecodeSealed: what is inside is checked too, as if a key had leaked.
func FuzzDecodeSealed(f *testing.F) {
	c := cookie{begun: time.Unix(1, 0), expires: time.Unix(2, 0), tenant: "default", begin: []byte("x")}
	f.Add(c.encode())
	tk, _ := ticket{expires: time.Unix(2, 0), request: "r-aaaaaaaaaaaaaaaaaaaaaaaa", tenant: "default", key: []byte("k")}.encode()
	f.Add(tk)
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := decodeCookie(b); err == nil && string(c.encode()) != string(b) {
			t.Fatal("cookie differs when written again")
		}
		if tk, err := decodeTicket(b); err == nil {
			if again, err := tk.encode(); err != nil || string(again) != string(b) {
				t.Fatalf("ticket differs when written again: %v", err)
			}
		}
	})
}

// FuzzHardware: whatever a machine says of itself, what is kept is short and
// clean.
func FuzzHardware(f *testing.F) {
	f.Add([]byte(`{"serial":"S1","nics":[{"name":"eth0","mac":"x"}],"memory_bytes":-1}`))
	f.Add([]byte(`{"serial":"\u202e\u001b[2J=cmd()"}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHardware(b)
		if err != nil {
			return
		}
		for _, s := range []string{h.Serial, h.UUID, h.Board, h.Vendor, h.TPMFirmware} {
			if len(s) > text.MaxField || text.Clean(s, text.MaxField) != s {
				t.Fatalf("kept %q", s)
			}
		}
		if len(h.NICs) > text.MaxNICs || len(h.Disks) > text.MaxDisks || len(h.Devices) > text.MaxDevices || h.MemoryBytes < 0 {
			t.Fatal("lists or numbers out of bounds")
		}
	})
}

// FuzzComplete feeds messages to Complete: with a cookie of ours and a good
// proof, so that all parsers are reached, and without.
func FuzzComplete(f *testing.F) {
	begin := fakeBegin(false)
	keys, err := parseKeys(begin)
	if err != nil {
		f.Fatal(err)
	}
	raw, _ := proto.Marshal(begin)
	k := cookie{begun: time.Unix(1, 0), expires: time.Unix(1<<33, 0), exporter: [32]byte{1}, tenant: "default", begin: raw}
	m := &musterv1.CompleteRequest{
		CertifyAttest: []byte("\xffTCG\x80\x17"), CertifySignature: []byte{0, 0x18, 0, 0xb}, QuoteAttest: []byte("\xffTCG\x80\x18"),
		Pcrs: []*musterv1.PcrValue{{Index: 0, Sha256: make([]byte, 32)}}, EventLog: []byte{1}, Csr: []byte{0x30, 0}, Hardware: []byte("{}"),
	}
	seed, _ := proto.Marshal(m)
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m musterv1.CompleteRequest
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		s := poisoned(t, func(c *Config) { c.Keys = func(context.Context, time.Time) ([]Key, error) { return fuzzKeys, nil } })
		if _, err := s.Complete(bound(), &m); err == nil {
			t.Fatal("completed without a cookie")
		}
		sealed, err := seal(fuzzKeys, cookieDomain, k.encode())
		if err != nil {
			t.Fatal(err)
		}
		m.Cookie = sealed
		m.Proof = enroll.Proof(k.secret[:], enroll.Transcript(enroll.TranscriptFields{
			Nonce: k.nonce[:], EK: keys.ekDER, AK: keys.ak.Raw, LDevID: keys.ldevid.Raw, CSR: m.Csr, Hardware: m.Hardware, Exporter: k.exporter[:],
		}))
		_, err = s.Complete(bound(), &m)
		if code := connect.CodeOf(err); err == nil || code != connect.CodePermissionDenied && code != connect.CodeInvalidArgument {
			t.Fatalf("got %v", err)
		}
	})
}

// FuzzBegin: no public area and no certificate makes Begin panic.
func FuzzBegin(f *testing.F) {
	for _, rsa := range []bool{true, false} {
		seed, _ := proto.Marshal(fakeBegin(rsa))
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m musterv1.BeginRequest
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		res, err := poisoned(t, nil).Begin(bound(), &m)
		if err == nil && (len(res.Nonce) != 32 || len(res.Cookie) == 0) {
			t.Fatal("half a challenge")
		}
		if err != nil && connect.CodeOf(err) == connect.CodeUnavailable {
			t.Fatalf("a message of a stranger looks like a fault of ours: %v", err)
		}
	})
}
