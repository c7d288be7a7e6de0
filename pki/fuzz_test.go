package pki_test

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
	"github.com/muster-edge/muster/pki/tpm"
)

// bound lists every byte that a proof covers. Changing any of them must lead
// to a refusal.
func bound(ev *pki.Evidence) []*[]byte {
	out := []*[]byte{&ev.AK.Raw, &ev.AK.Name, &ev.LDevID.Raw, &ev.LDevID.Name, &ev.EKs[0].Key.Raw, &ev.EKs[0].Key.Name}
	for _, s := range []*pki.Statement{&ev.Certify, &ev.Quote} {
		out = append(out, &s.Raw, &s.ExtraData, &s.QualifiedSigner, &s.Signature.R, &s.Signature.S)
	}
	return append(out, &ev.Certify.Certified.Name, &ev.Certify.Certified.QualifiedName, &ev.Quote.Quoted.PCRDigest)
}

// FuzzVerifyBindings edits honest evidence: triples of field, place, change.
func FuzzVerifyBindings(f *testing.F) {
	f.Add([]byte{0, 5, 1})
	f.Add([]byte{6, 0, 0xff, 11, 3, 4})
	f.Add([]byte{13, 0, 0x80})
	honest := newSoft().evidence(f, nil, nil)
	f.Fuzz(func(t *testing.T, edits []byte) {
		ev := honest
		ev.EKs = append([]pki.EndorsementKey(nil), honest.EKs...)
		ev.PCRs = clonePCRs(honest.PCRs)
		fields := bound(&ev)
		for ; len(edits) >= 3 && len(edits) < 300; edits = edits[3:] {
			n := int(edits[0]) % (len(fields) + len(pki.QuotePCRs))
			if n >= len(fields) {
				v := ev.PCRs[pki.QuotePCRs[n-len(fields)]]
				v[int(edits[1])%len(v)] ^= edits[2]
				continue
			}
			if len(*fields[n]) == 0 {
				continue
			}
			b := bytes.Clone(*fields[n])
			b[int(edits[1])%len(b)] ^= edits[2]
			*fields[n] = b
		}
		_, err := pki.Verify(ev, pki.Policy{Now: now, TimeFloor: floor})
		if same := reflect.DeepEqual(ev, honest); same != (err == nil) {
			t.Fatalf("evidence is unchanged: %v; verdict: %v", same, err)
		}
	})
}

// FuzzVerifyBytes goes the way of bytes from the network: parse what parses,
// verify, and neither panic nor trust.
func FuzzVerifyBytes(f *testing.F) {
	honest := newSoft().evidence(f, nil, nil)
	f.Add(honest.AK.Raw, honest.LDevID.Raw, honest.Certify.Raw, honest.Quote.Raw, []byte{1}, []byte{1}, []byte{2})
	certificate, err := newCA(f, false).Certify(honest.EKs[0].Key.Public, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(honest.EKs[0].Key.Raw, honest.AK.Raw, honest.Certify.Raw, honest.Quote.Raw, certificate, []byte{0x30, 3, 2, 1}, []byte("log"))
	f.Add(tpm2.Marshal(tpm2.ECCEKTemplate), []byte{}, []byte{}, []byte{}, []byte{}, []byte{}, []byte{})
	signature := softSignature(newSoft().ak, honest.Certify.Raw)
	image := goldenImage()
	f.Fuzz(func(t *testing.T, ak, ldevid, certify, quote, certificate, chain, log []byte) {
		ev := pki.Evidence{Transcript: transcript, PCRs: honest.PCRs}
		ev.AK, _ = tpm.ParsePublic(ak)
		ev.LDevID, _ = tpm.ParsePublic(ldevid)
		ev.CSRKey = ev.LDevID.Public
		ev.Certify, _ = tpm.ParseCertify(certify, signature)
		ev.Quote, _ = tpm.ParseQuote(quote, signature)
		ek := pki.EndorsementKey{Key: honest.EKs[0].Key}
		ek.Certificate, ek.CertificateError = ekcert.ParseCertificate(certificate)
		if c, err := ekcert.ParseIntermediate(chain); err == nil {
			ek.Intermediates = append(ek.Intermediates, c)
		}
		ev.EKs = []pki.EndorsementKey{ek}
		ev.Log, ev.LogError = ekcert.ParseEventLog(log)
		pol := pki.Policy{Now: now, TimeFloor: floor, VendorRoots: pool(), Images: []fleet.Image{image}}
		v, err := pki.Verify(ev, pol)
		if err == nil && (v.Identity != fleet.IdentityUnverified || v.Boot != fleet.BootUnknown) {
			t.Fatalf("bytes became %v, %v", v.Identity, v.Boot)
		}
		// The second half of Verify is out of reach of a fuzzer that cannot
		// sign; it is given what can be signed for it.
		ev = honest
		ev.EKs = []pki.EndorsementKey{ek}
		ev.Log, ev.LogError = ekcert.ParseEventLog(log)
		if v, err := pki.Verify(ev, pol); err == nil && (v.Identity != fleet.IdentityUnverified || v.Boot != fleet.BootUnknown) {
			t.Fatalf("bytes became %v, %v", v.Identity, v.Boot)
		}
	})
}
