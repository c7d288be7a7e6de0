package pki_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"math/big"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func TestVerifyHonestMachine(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	ev := m.evidence(t)
	v := verify(t, ev, pki.Policy{VendorRoots: m.swtpm.CA.Roots()})
	if v.Identity != fleet.IdentityHardware || v.Boot != fleet.BootUnknown {
		t.Errorf("verdict %v, %v: %v", v.Identity, v.Boot, v.Findings)
	}
	want, err := fleet.HashEK(ev.EKs[0].Key.Public)
	if err != nil || v.EK != want || len(v.Aliases) != 1 {
		t.Errorf("EK %v, %d aliases", v.EK, len(v.Aliases))
	}
	if v.TPMVendor == "" || v.TPMModel != "swtpm" || v.EKIssuer == "" || v.EKRoot == "" {
		t.Errorf("names %q %q %q %q %q", v.TPMVendor, v.TPMModel, v.TPMFirmware, v.EKIssuer, v.EKRoot)
	}
	if again := verify(t, ev, pki.Policy{VendorRoots: m.swtpm.CA.Roots()}); again.EK != v.EK || again.Identity != v.Identity {
		t.Error("a second look differs")
	}
}

// TestVerifyHostileStatements uses a real TPM's own signatures for what the
// machine should not have signed or not shown.
func TestVerifyHostileStatements(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{Banks: "sha1,sha256"})
	honest := m.evidence(t)
	verify(t, honest, pki.Policy{})
	r := m.raw(t)
	ak := m.primary(t, tpm.AKTemplate(0))
	sign := func(s tpm2.TPMLPCRSelection, about [32]byte) pki.Statement {
		t.Helper()
		rsp, err := tpm2.Quote{
			SignHandle:     ak,
			QualifyingData: tpm2.TPM2BData{Buffer: about[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      s,
		}.Execute(r)
		if err != nil {
			t.Fatal(err)
		}
		return parseQuote(t, rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature))
	}
	selection := func(s ...tpm2.TPMSPCRSelection) tpm2.TPMLPCRSelection {
		return tpm2.TPMLPCRSelection{PCRSelections: s}
	}
	bank := func(alg tpm2.TPMAlgID, pcrs ...int) tpm2.TPMSPCRSelection {
		return tpm2.TPMSPCRSelection{Hash: alg, PCRSelect: selectBits(pcrs...)}
	}
	other := sha256.Sum256([]byte("another transcript"))
	sha256All := bank(tpm2.TPMAlgSHA256, pki.QuotePCRs...)
	for _, c := range []struct {
		when  string
		edit  func(*pki.Evidence)
		check string
	}{
		{"when the quote is about another transcript", func(ev *pki.Evidence) { ev.Quote = sign(selection(sha256All), other) }, "quote"},
		{"when the quote lacks a PCR", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(bank(tpm2.TPMAlgSHA256, pki.QuotePCRs[1:]...)), transcript)
		}, "quote-pcrs"},
		{"when the quote has one PCR more", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(bank(tpm2.TPMAlgSHA256, append([]int{1}, pki.QuotePCRs...)...)), transcript)
		}, "quote-pcrs"},
		{"when the quote selects no PCR of the bank", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(bank(tpm2.TPMAlgSHA256)), transcript)
			ev.PCRs = nil
		}, "quote-pcrs"},
		{"when the quote has no bank", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(), transcript)
			ev.PCRs = nil
		}, "quote"},
		{"when the quote is over the SHA-1 bank", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(bank(tpm2.TPMAlgSHA1, pki.QuotePCRs...)), transcript)
		}, "quote"},
		{"when the quote is over both banks", func(ev *pki.Evidence) {
			ev.Quote = sign(selection(sha256All, bank(tpm2.TPMAlgSHA1, pki.QuotePCRs...)), transcript)
		}, "quote"},
		{"when a value is not the quoted one", func(ev *pki.Evidence) {
			ev.PCRs = clonePCRs(ev.PCRs)
			ev.PCRs[4][0] ^= 1
		}, "quote-pcrs"},
		{"when a value is missing", func(ev *pki.Evidence) {
			ev.PCRs = clonePCRs(ev.PCRs)
			delete(ev.PCRs, 12)
		}, "quote-pcrs"},
		{"when there is a value too many", func(ev *pki.Evidence) {
			ev.PCRs = clonePCRs(ev.PCRs)
			ev.PCRs[1] = make([]byte, 32)
		}, "quote-pcrs"},
		{"when a value has SHA-1's length", func(ev *pki.Evidence) {
			ev.PCRs = clonePCRs(ev.PCRs)
			ev.PCRs[0] = ev.PCRs[0][:20]
		}, "quote-pcrs"},
		{"when the certify statement is about another transcript", func(ev *pki.Evidence) {
			ev.Certify = m.certify(t, m.primary(t, tpm.LDevIDTemplate(0)), ak, other)
		}, "certify"},
		{"when the certify statement is a quote", func(ev *pki.Evidence) { ev.Certify = ev.Quote }, "certify"},
		{"when the quote is a certify statement", func(ev *pki.Evidence) { ev.Quote = ev.Certify }, "quote"},
		{"when another AK of the same TPM certified", func(ev *pki.Evidence) {
			ev.Certify = m.certify(t, m.primary(t, tpm.LDevIDTemplate(0)), m.primary(t, tpm.AKTemplate(1)), transcript)
		}, "certify"},
		{"when another AK's signature is under this AK's statement", func(ev *pki.Evidence) {
			ev.Certify.Signature = m.certify(t, m.primary(t, tpm.LDevIDTemplate(0)), m.primary(t, tpm.AKTemplate(1)), transcript).Signature
		}, "certify-signature"},
		{"when another key of the same TPM is certified", func(ev *pki.Evidence) {
			ev.Certify = m.certify(t, m.primary(t, tpm.LDevIDTemplate(1)), ak, transcript)
		}, "certify-name"},
		{"when the LDevID was made with the software of the machine", func(ev *pki.Evidence) {
			key := softKey()
			ev.LDevID = parsePublic(t, eccPublic(tpm.LDevIDTemplate(0), &key.PublicKey))
			ev.CSRKey = &key.PublicKey
		}, "certify-name"},
		{"when the request is for a software key", func(ev *pki.Evidence) { ev.CSRKey = &softKey().PublicKey }, "csr-key"},
		{"when the request has no key", func(ev *pki.Evidence) { ev.CSRKey = nil }, "csr-key"},
		{"when the request's key is a nil pointer", func(ev *pki.Evidence) { ev.CSRKey = (*ecdsa.PublicKey)(nil) }, "csr-key"},
		{"when the request is for the AK", func(ev *pki.Evidence) { ev.CSRKey = ev.AK.Public }, "csr-key"},
		{"when the LDevID is the AK", func(ev *pki.Evidence) {
			ev.LDevID = ev.AK
			ev.Certify = m.certify(t, ak, ak, transcript)
			ev.CSRKey = ev.AK.Public
		}, "ldevid"},
	} {
		t.Run(c.when, func(t *testing.T) {
			ev := honest
			c.edit(&ev)
			m.flush(t, ak)
			refused(t, ev, c.check)
		})
	}
	verify(t, honest, pki.Policy{}) // no row changed what it was given
}

// primary makes a primary key in the owner hierarchy.
func (m *machine) primary(t *testing.T, template tpm2.TPMTPublic) tpm2.AuthHandle {
	t.Helper()
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: owner, InPublic: tpm2.New2B(template)}.Execute(m.raw(t))
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
}

// flush frees all slots but those kept.
func (m *machine) flush(t *testing.T, keep ...tpm2.AuthHandle) {
	t.Helper()
	r := m.raw(t)
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: 0x80000000, PropertyCount: 16}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range list.Handle {
		if !slices.ContainsFunc(keep, func(k tpm2.AuthHandle) bool { return k.Handle == h }) {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(r); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (m *machine) certify(t *testing.T, object, signer tpm2.AuthHandle, about [32]byte) pki.Statement {
	t.Helper()
	rsp, err := tpm2.Certify{
		ObjectHandle:   object,
		SignHandle:     signer,
		QualifyingData: tpm2.TPM2BData{Buffer: about[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(m.raw(t))
	if err != nil {
		t.Fatal(err)
	}
	return parseCertify(t, rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature))
}

// TestVerifyUnrestrictedAK: an unrestricted key signs anything, also a
// statement made by hand for a software key, magic and all. Its signature is
// a TPM's, its name was activated; only its attributes give it away.
func TestVerifyUnrestrictedAK(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	ev := m.evidence(t)
	m.flush(t)
	template := tpm.AKTemplate(0)
	template.ObjectAttributes.Restricted = false
	r := m.raw(t)
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: owner, InPublic: tpm2.New2B(template)}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	handle := tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
	sign := func(a tpm2.TPMSAttest) ([]byte, []byte) {
		attest := tpm2.Marshal(a)
		digest := sha256.Sum256(attest)
		sig, err := tpm2.Sign{
			KeyHandle:  handle,
			Digest:     tpm2.TPM2BDigest{Buffer: digest[:]},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(r)
		if err != nil {
			t.Fatal(err)
		}
		return attest, tpm2.Marshal(sig.Signature)
	}
	stolen := softKey()
	ev.AK = parsePublic(t, rsp.OutPublic.Bytes())
	ev.LDevID = parsePublic(t, eccPublic(tpm.LDevIDTemplate(0), &stolen.PublicKey))
	ev.CSRKey = &stolen.PublicKey
	attest, sig := sign(certifyAttest(ev.AK.Name, ev.LDevID.Name))
	ev.Certify = parseCertify(t, attest, sig)
	h := sha256.New()
	for _, i := range pki.QuotePCRs {
		h.Write(ev.PCRs[i])
	}
	attest, sig = sign(quoteAttest(ev.AK.Name, h.Sum(nil), tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: selectBits(pki.QuotePCRs...)}))
	ev.Quote = parseQuote(t, attest, sig)
	refused(t, ev, "ak")

	// Claiming the attribute does not help: it is part of the name.
	ev.AK.Attributes = pki.AKAttributes
	refused(t, ev, "ak")
	ev.AK.Raw = eccPublic(tpm.AKTemplate(0), ev.AK.Public.(*ecdsa.PublicKey))
	refused(t, ev, "ak-name")
	// With the name of the claimed key all fits but the activation, which is
	// for that name, and which no TPM answers; the statements are about the
	// true name.
	ev.AK = parsePublic(t, ev.AK.Raw)
	refused(t, ev, "certify")
}

// TestVerifyWeakLDevID: keys that the TPM certifies gladly, but that can
// leave it or came from outside.
func TestVerifyWeakLDevID(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	honest := m.evidence(t)
	r := m.raw(t)
	for _, c := range []struct {
		when string
		edit func(*tpm2.TPMTPublic)
	}{
		{"when it can leave the TPM", func(p *tpm2.TPMTPublic) {
			p.ObjectAttributes.FixedTPM, p.ObjectAttributes.FixedParent = false, false
			p.ObjectAttributes.EncryptedDuplication = false
		}},
		{"when it counts wrong passwords", func(p *tpm2.TPMTPublic) { p.ObjectAttributes.NoDA = false }},
		{"when it decrypts, too", func(p *tpm2.TPMTPublic) {
			p.ObjectAttributes.Decrypt = true
			d, _ := p.Parameters.ECCDetail()
			d2 := *d
			d2.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &d2)
		}},
		{"when it has no fixed scheme", func(p *tpm2.TPMTPublic) {
			d, _ := p.Parameters.ECCDetail()
			d2 := *d
			d2.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &d2)
		}},
		{"when it has a policy", func(p *tpm2.TPMTPublic) { p.AuthPolicy = tpm2.TPM2BDigest{Buffer: make([]byte, 32)} }},
		{"when its name is SHA-384", func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA384 }},
		{"when it is on P-384", func(p *tpm2.TPMTPublic) {
			d, _ := p.Parameters.ECCDetail()
			d2 := *d
			d2.CurveID = tpm2.TPMECCNistP384
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &d2)
		}},
		{"when it is restricted", func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = true }},
		{"when it is RSA", func(p *tpm2.TPMTPublic) {
			p.Type = tpm2.TPMAlgRSA
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048, Scheme: tpm2.TPMTRSAScheme{
				Scheme: tpm2.TPMAlgRSASSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
			}})
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
		}},
	} {
		t.Run(c.when, func(t *testing.T) {
			m.flush(t)
			template := tpm.LDevIDTemplate(0)
			c.edit(&template)
			rsp, err := tpm2.CreatePrimary{PrimaryHandle: owner, InPublic: tpm2.New2B(template)}.Execute(r)
			if err != nil {
				t.Fatal(err)
			}
			key := tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
			ev := honest
			ev.LDevID = parsePublic(t, rsp.OutPublic.Bytes())
			ev.CSRKey = ev.LDevID.Public
			ev.Certify = m.certify(t, key, m.primary(t, tpm.AKTemplate(0)), transcript)
			refused(t, ev, "ldevid")
		})
	}
	t.Run("when it is a software key that was imported", func(t *testing.T) {
		m.flush(t)
		soft := softKey()
		ev := honest
		ev.LDevID, ev.Certify = m.imported(t, soft)
		ev.CSRKey = &soft.PublicKey
		refused(t, ev, "ldevid")
		// Claiming the attributes of a true LDevID changes the name.
		ev.LDevID = parsePublic(t, eccPublic(tpm.LDevIDTemplate(0), &soft.PublicKey))
		refused(t, ev, "certify-name")
	})
	t.Run("when it is a child of another key", func(t *testing.T) {
		m.flush(t)
		srk := m.primary(t, tpm2.ECCSRKTemplate)
		rsp, err := tpm2.CreateLoaded{ParentHandle: srk, InPublic: tpm2.New2BTemplate(ptr(tpm.LDevIDTemplate(0)))}.Execute(r)
		if err != nil {
			t.Fatal(err)
		}
		key := tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)}
		m.flush(t, key)
		ev := honest
		ev.LDevID = parsePublic(t, rsp.OutPublic.Bytes())
		ev.CSRKey = ev.LDevID.Public
		ev.Certify = m.certify(t, key, m.primary(t, tpm.AKTemplate(0)), transcript)
		refused(t, ev, "certify-name")
	})
}

func ptr[T any](v T) *T { return &v }

// imported loads a software key into the TPM and lets the AK certify it.
func (m *machine) imported(t *testing.T, key *ecdsa.PrivateKey) (pki.Key, pki.Statement) {
	t.Helper()
	r := m.raw(t)
	template := tpm.LDevIDTemplate(0)
	template.ObjectAttributes.FixedTPM, template.ObjectAttributes.FixedParent = false, false
	template.ObjectAttributes.SensitiveDataOrigin = false
	public := eccPublic(template, &key.PublicKey)
	private, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	sensitive := tpm2.Marshal(tpm2.TPMTSensitive{
		SensitiveType: tpm2.TPMAlgECC,
		Sensitive:     tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgECC, &tpm2.TPM2BECCParameter{Buffer: private}),
	})
	srk := m.primary(t, tpm2.ECCSRKTemplate)
	imp, err := tpm2.Import{
		ParentHandle: srk,
		ObjectPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](public),
		Duplicate:    tpm2.TPM2BPrivate{Buffer: append(binary.BigEndian.AppendUint16(nil, uint16(len(sensitive))), sensitive...)},
		Symmetric:    tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: srk, InPrivate: imp.OutPrivate, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](public)}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	h := tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)}
	m.flush(t, h)
	return parsePublic(t, public), m.certify(t, h, m.primary(t, tpm.AKTemplate(0)), transcript)
}

// TestVerifyDoesNotTrustTheParser: fields that differ from the bytes that
// were hashed and signed are refused, whoever made them differ.
func TestVerifyDoesNotTrustTheParser(t *testing.T) {
	honest := newSoft().evidence(t, nil, nil)
	verify(t, honest, pki.Policy{})
	foreign := &softKey().PublicKey
	for _, c := range []struct {
		when  string
		edit  func(*pki.Evidence)
		check string
	}{
		{"when the AK's raw bytes are another key's", func(ev *pki.Evidence) { ev.AK.Raw = ev.LDevID.Raw }, "ak-name"},
		{"when the AK's name and bytes are another key's", func(ev *pki.Evidence) { ev.AK.Raw, ev.AK.Name = ev.LDevID.Raw, ev.LDevID.Name }, "ak"},
		{"when the AK's point is another", func(ev *pki.Evidence) { ev.AK.Public = foreign }, "ak"},
		{"when the AK's public key is an RSA key", func(ev *pki.Evidence) { ev.AK.Public = ev.EKs[0].Key.Public }, "ak"},
		{"when the AK's public key is missing", func(ev *pki.Evidence) { ev.AK.Public = nil }, "ak"},
		{"when the AK's public key is a nil pointer", func(ev *pki.Evidence) { ev.AK.Public = (*ecdsa.PublicKey)(nil) }, "ak"},
		{"when the AK's public key is empty", func(ev *pki.Evidence) { ev.AK.Public = &ecdsa.PublicKey{} }, "ak"},
		{"when the AK's point is off the curve", func(ev *pki.Evidence) {
			//lint:ignore SA1019 the constructors make no bad points
			ev.AK.Public = &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}
		}, "ak"},
		{"when the AK is empty", func(ev *pki.Evidence) { ev.AK = pki.Key{} }, "ak-name"},
		{"when one software key is both AK and LDevID", func(ev *pki.Evidence) {
			one := &soft{ek: newSoft().ek, ak: newSoft().ak, ldevid: newSoft().ak}
			*ev = one.evidence(t, nil, nil)
		}, "distinct-keys"},
		{"when the LDevID is empty", func(ev *pki.Evidence) { ev.LDevID = pki.Key{} }, "ldevid-name"},
		{"when the LDevID's policy is hidden", func(ev *pki.Evidence) {
			p := tpm.LDevIDTemplate(0)
			p.AuthPolicy = tpm2.TPM2BDigest{Buffer: make([]byte, 32)}
			ev.LDevID = parsePublic(t, eccPublic(p, ev.LDevID.Public.(*ecdsa.PublicKey)))
			ev.LDevID.AuthPolicy = nil
		}, "ldevid"},
		{"when the magic is in the field only", func(ev *pki.Evidence) { ev.Certify.Raw = flip(ev.Certify.Raw, 0) }, "certify"},
		{"when the magic is wrong", func(ev *pki.Evidence) { ev.Certify.Magic ^= 1 }, "certify"},
		{"when the magic is wrong and signed so", func(ev *pki.Evidence) {
			// A restricted key signs data from outside that does not begin with
			// the magic: only the magic tells the TPM's own statements.
			ev.Certify.Raw = flip(ev.Certify.Raw, 0)
			ev.Certify.Magic ^= 1 << 24
			digest := sha256.Sum256(ev.Certify.Raw)
			r, s, err := ecdsa.Sign(rand.Reader, newSoft().ak, digest[:])
			if err != nil {
				t.Fatal(err)
			}
			ev.Certify.Signature.R, ev.Certify.Signature.S = r.Bytes(), s.Bytes()
		}, "certify"},
		{"when a byte moves from one PCR value to the next", func(ev *pki.Evidence) {
			ev.PCRs = clonePCRs(ev.PCRs)
			ev.PCRs[2] = append([]byte{ev.PCRs[0][31]}, ev.PCRs[2]...)
			ev.PCRs[0] = ev.PCRs[0][:31]
		}, "quote-pcrs"},
		{"when the type is wrong", func(ev *pki.Evidence) { ev.Quote.Type++ }, "quote"},
		{"when the transcript is in the field only", func(ev *pki.Evidence) { ev.Transcript[0] ^= 1; ev.Certify.ExtraData = ev.Transcript[:] }, "certify"},
		{"when the extra data is empty", func(ev *pki.Evidence) { ev.Quote.ExtraData = nil }, "quote"},
		{"when the certified name is in the field only", func(ev *pki.Evidence) {
			k := parsePublic(t, eccPublic(tpm.LDevIDTemplate(0), foreign))
			ev.LDevID, ev.CSRKey = k, foreign
			ev.Certify.Certified = pki.Certified{Name: k.Name, QualifiedName: pki.OwnerQualifiedName(k.Name)}
		}, "certify"},
		{"when the certified name stands elsewhere in the statement", func(ev *pki.Evidence) {
			// A reader that searches for the name would take it.
			ev.Certify.Raw = append(bytes.Clone(ev.Certify.Raw), ev.LDevID.Name...)
		}, "certify"},
		{"when the PCR digest is in the field only", func(ev *pki.Evidence) { ev.Quote.Quoted.PCRDigest = make([]byte, 32) }, "quote"},
		{"when the selection is in the field only", func(ev *pki.Evidence) {
			ev.Quote.Quoted.PCRSelection = map[uint16][]int{pki.AlgSHA256: {0}}
		}, "quote"},
		{"when the selection has an impossible PCR", func(ev *pki.Evidence) {
			ev.Quote.Quoted.PCRSelection = map[uint16][]int{pki.AlgSHA256: {-1, 400}}
		}, "quote"},
		{"when the signature is RSA", func(ev *pki.Evidence) {
			ev.Certify.Signature = pki.Signature{Alg: pki.AlgRSASSA, Hash: pki.AlgSHA256, RSA: make([]byte, 256)}
		}, "certify-signature"},
		{"when the signature is missing", func(ev *pki.Evidence) { ev.Quote.Signature = pki.Signature{} }, "quote-signature"},
		{"when the signature is SHA-1", func(ev *pki.Evidence) { ev.Quote.Signature.Hash = pki.AlgSHA1 }, "quote-signature"},
		{"when the signature is zero", func(ev *pki.Evidence) { ev.Quote.Signature.R, ev.Quote.Signature.S = nil, nil }, "quote-signature"},
		{"when the signature is endless", func(ev *pki.Evidence) { ev.Quote.Signature.R = make([]byte, 1<<20) }, "quote-signature"},
		{"when there is no EK", func(ev *pki.Evidence) { ev.EKs = nil }, "ek"},
		{"when there are too many EKs", func(ev *pki.Evidence) { ev.EKs = make([]pki.EndorsementKey, 100) }, "ek"},
		{"when an EK is shown twice", func(ev *pki.Evidence) { ev.EKs = append(ev.EKs, ev.EKs[0]) }, "ek"},
		{"when the EK is empty", func(ev *pki.Evidence) { ev.EKs = []pki.EndorsementKey{{}} }, "ek"},
		{"when the EK's name is another", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Key.Name = ev.AK.Name
		}, "ek"},
		{"when the EK has 3072 bits", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Key.Bits = 3072
		}, "ek"},
		{"when the EK's modulus is missing", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Key.Public = &rsa.PublicKey{}
		}, "ek"},
		{"when the EK's modulus is shorter than its bits", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Key.Public = &rsa.PublicKey{N: big.NewInt(15), E: 65537}
		}, "ek"},
		{"when the EK signs", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Key.Attributes |= pki.AttrSign
		}, "ek"},
		{"when the EK is an AK", func(ev *pki.Evidence) { ev.EKs = []pki.EndorsementKey{{Key: ev.AK}} }, "ek"},
		{"when there are too many intermediates", func(ev *pki.Evidence) {
			ev.EKs = slices.Clone(ev.EKs)
			ev.EKs[0].Intermediates = make([]*x509.Certificate, 100)
		}, "ek"},
		{"when there is nothing", func(ev *pki.Evidence) { *ev = pki.Evidence{} }, "ek"},
	} {
		t.Run(c.when, func(t *testing.T) {
			ev := honest
			c.edit(&ev)
			refused(t, ev, c.check)
		})
	}
}

func flip(b []byte, i int) []byte {
	b = bytes.Clone(b)
	b[i] ^= 1
	return b
}

func TestClockRegressed(t *testing.T) {
	before := pki.ClockInfo{Clock: 100, ResetCount: 5, RestartCount: 5}
	for _, c := range []struct {
		now  pki.ClockInfo
		want bool
	}{
		{before, false},
		{pki.ClockInfo{Clock: 101, ResetCount: 5, RestartCount: 5}, false},
		{pki.ClockInfo{Clock: 99, ResetCount: 5, RestartCount: 5}, true},
		{pki.ClockInfo{Clock: 1, ResetCount: 6, RestartCount: 5}, false},
		{pki.ClockInfo{Clock: 1, ResetCount: 5, RestartCount: 6}, false},
		{pki.ClockInfo{Clock: 200, ResetCount: 4, RestartCount: 9}, true},
		{pki.ClockInfo{Clock: 200, ResetCount: 5, RestartCount: 4}, true},
	} {
		if got := c.now.Regressed(before); got != c.want {
			t.Errorf("%+v after %+v: %v", c.now, before, got)
		}
	}
	edge := pki.ClockInfo{ResetCount: ^uint32(0), RestartCount: ^uint32(0)}
	if wrapped := (pki.ClockInfo{ResetCount: 0, RestartCount: ^uint32(0)}); wrapped.Regressed(edge) || !edge.Regressed(wrapped) {
		t.Error("a counter that wraps is taken for one that went back")
	}
	// A real TPM's clock goes on over power cycles, also obfuscated.
	m := newMachine(t, swtpmtest.Options{NoCertificate: true})
	first := m.evidence(t).Quote.Clock
	if err := m.swtpm.Restart(); err != nil {
		t.Fatal(err)
	}
	m.read(t)
	second := m.evidence(t).Quote.Clock
	if second.Regressed(first) || !first.Regressed(second) {
		t.Errorf("%+v, then %+v", first, second)
	}
}
