package k3s

import (
	"strings"
	"testing"
)

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte(threeMembers))
	f.Add([]byte(`{"members":[{"ID":-1}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseInfo(b)
		if err != nil {
			return
		}
		if len(l) == 0 || len(l) > maxMembers {
			t.Errorf("%d members", len(l))
		}
		for _, m := range nameMembers(l, nil, nil) {
			if len(m.node) > 253 && !strings.HasPrefix(m.Name, string(m.node)) {
				t.Errorf("node %q of %q", m.node, m.Name)
			}
		}
	})
}

func FuzzParseNodes(f *testing.F) {
	f.Add([]byte(threeNodes))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseNodes(b)
		if err == nil && len(l) > maxNodes {
			t.Errorf("%d nodes", len(l))
		}
	})
}

func FuzzLedger(f *testing.F) {
	f.Add([]byte(`{"format":"muster/ledger/v1","record":{"uid":"u","epoch":1,"version":1,"founder":"n-aaaaaaaaaaaaaaaaaaaaaaaa","servers":[]},"plan":{"id":"p","phase":"switch","leader":"n-aaaaaaaaaaaaaaaaaaaaaaaa","go":0}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := decodeLedger(b)
		if err != nil {
			return
		}
		// What was accepted can be written and read again.
		text, err := encodeLedger(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeLedger([]byte(text)); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzToken(f *testing.F) {
	f.Add("K10" + strings.Repeat("ab", 32) + "::server:0123456789abcdef")
	f.Add("K10" + strings.Repeat("ab", 32) + "::abcdef.0123456789abcdef")
	f.Fuzz(func(t *testing.T, s string) {
		hash, secret, _, err := ParseToken(s)
		if err == nil && (len(hash) != 64 || secret == "" || strings.ContainsAny(secret, " \n\x00") || len(s) > maxToken) {
			t.Errorf("%q: %q %q", s, hash, secret)
		}
	})
}

func FuzzDamage(f *testing.F) {
	f.Add([]byte("--- muster starts\nlevel=fatal walpb: crc mismatch\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := findDamage(b); len(got) > maxDamage {
			t.Errorf("%d bytes", len(got))
		}
	})
}
