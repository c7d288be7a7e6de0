package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

var update = flag.Bool("update", false, "rewrite golden files (never for templates that machines use)")

// TestTemplatesAreFrozen: a changed byte makes every node a stranger.
func TestTemplatesAreFrozen(t *testing.T) {
	for name, template := range map[string]tpm2.TPMTPublic{
		"ak-0":     tpm.AKTemplate(0),
		"ldevid-0": tpm.LDevIDTemplate(0),
		"ak-1":     tpm.AKTemplate(1),
	} {
		path := filepath.Join("testdata", "template-"+name+".hex")
		got := hex.EncodeToString(tpm2.Marshal(template)) + "\n"
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got != string(want) {
			t.Errorf("%s is\n%s, was\n%s", name, got, want)
		}
	}
	if tpm.Generation != 0 {
		t.Error("the generation changed: every node gets new keys; is that decided?")
	}
}

// TestPolicies computes the policies of EKs from their definitions.
func TestPolicies(t *testing.T) {
	// PolicySecret: H(H(0 || TPM_CC_PolicySecret || TPM_RH_ENDORSEMENT) || policyRef), Part 3 §23.4.
	cc := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 0x151), 0x4000000B)
	a256 := sha256.Sum256(append(make([]byte, 32), cc...))
	a256 = sha256.Sum256(a256[:])
	a384 := sha512.Sum384(append(make([]byte, 48), cc...))
	a384 = sha512.Sum384(a384[:])
	// PolicyOR: H(0 || TPM_CC_PolicyOR || branches), Part 3 §23.6.
	or := binary.BigEndian.AppendUint32(nil, 0x171)
	b256 := sha256.Sum256(slices.Concat(make([]byte, 32), or, tpm.PolicyA256, tpm.PolicyC256))
	b384 := sha512.Sum384(slices.Concat(make([]byte, 48), or, tpm.PolicyA384, tpm.PolicyC384))
	for name, p := range map[string][2][]byte{
		"A256": {a256[:], tpm.PolicyA256}, "A384": {a384[:], tpm.PolicyA384},
		"B256": {b256[:], tpm.PolicyB256}, "B384": {b384[:], tpm.PolicyB384},
	} {
		if !bytes.Equal(p[0], p[1]) {
			t.Errorf("policy %s is %x, computed %x", name, p[1], p[0])
		}
	}
}

func softKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func withPoint(template tpm2.TPMTPublic, x, y []byte) []byte {
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y},
	})
	return tpm2.Marshal(template)
}

func point(t testing.TB, k *ecdsa.PrivateKey) (x, y []byte) {
	t.Helper()
	p, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return p[1 : 1+len(p)/2], p[1+len(p)/2:]
}

func goodAK(t testing.TB) []byte {
	x, y := point(t, softKey(t, elliptic.P256()))
	return withPoint(tpm.AKTemplate(0), x, y)
}

func rsaEK(modulus []byte, edit func(*tpm2.TPMSRSAParms)) []byte {
	p := tpm2.RSAEKTemplate
	d, _ := p.Parameters.RSADetail()
	d2 := *d
	if edit != nil {
		edit(&d2)
	}
	p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &d2)
	p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: modulus})
	return tpm2.Marshal(p)
}

func TestParsePublic(t *testing.T) {
	ak := goodAK(t)
	k, err := tpm.ParsePublic(ak)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.Sum256(ak)
	if k.Type != "ecc" || k.Curve != "P-256" || k.Bits != 256 || k.Attributes != pki.AKAttributes || k.Scheme != pki.AlgECDSA ||
		k.Hash != pki.AlgSHA256 || !bytes.Equal(k.Raw, ak) || !bytes.Equal(k.Name, append([]byte{0, 0xB}, h[:]...)) {
		t.Errorf("parsed %+v", k)
	}
	ak[20] ^= 1
	if bytes.Equal(k.Raw, ak) {
		t.Error("the key shares memory with its input")
	}

	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	n := rsaKey.N.Bytes()
	if k, err = tpm.ParsePublic(rsaEK(n, nil)); err != nil || k.Bits != 2048 || !k.Public.(*rsa.PublicKey).Equal(&rsaKey.PublicKey) || k.Scheme != pki.AlgNull {
		t.Errorf("RSA EK: %+v, %v", k, err)
	}

	p256, p384 := softKey(t, elliptic.P256()), softKey(t, elliptic.P384())
	x, y := point(t, p256)
	x3, y3 := point(t, p384)
	even := bytes.Clone(n)
	even[255] &^= 1
	small := bytes.Clone(n)
	small[0] = 0
	offCurve := bytes.Clone(y)
	offCurve[31] ^= 1
	curve := func(c tpm2.TPMECCCurve) tpm2.TPMTPublic {
		p := tpm.AKTemplate(0)
		d, _ := p.Parameters.ECCDetail()
		d2 := *d
		d2.CurveID = c
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &d2)
		return p
	}
	sha1Name := tpm.AKTemplate(0)
	sha1Name.NameAlg = tpm2.TPMAlgSHA1
	keyedHash := tpm2.Marshal(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull}}),
		Unique:     tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: make([]byte, 32)}),
	})
	good := withPoint(tpm.AKTemplate(0), x, y)
	for _, c := range []struct {
		when string
		in   []byte
		want string
	}{
		{"when it is empty", nil, "EOF"},
		{"when it is cut", good[:len(good)-1], ""},
		{"when bytes follow", append(bytes.Clone(good), 0), "trailing"},
		{"when it is huge", make([]byte, 70000), "too long"},
		{"when it is noise", bytes.Repeat([]byte{0xff}, 100), ""},
		{"when a size field is beyond the end", append(bytes.Clone(good[:8]), 0xff, 0xff), ""},
		{"when the point is off the curve", withPoint(tpm.AKTemplate(0), x, offCurve), "not on the curve"},
		{"when the point is zero", withPoint(tpm.AKTemplate(0), make([]byte, 32), make([]byte, 32)), "not on the curve"},
		{"when the point is empty", withPoint(tpm.AKTemplate(0), nil, nil), "not on the curve"},
		{"when a coordinate is too long", withPoint(tpm.AKTemplate(0), append([]byte{0}, x...), y), "longer than the curve"},
		{"when a P-384 point is on P-256", withPoint(tpm.AKTemplate(0), x3, y3), "longer than the curve"},
		{"when the curve is P-521", withPoint(curve(tpm2.TPMECCNistP521), x, y), "curve 0x0005"},
		{"when the curve is unknown", withPoint(curve(0x7777), x, y), "curve 0x7777"},
		{"when the name is SHA-1", withPoint(sha1Name, x, y), "not SHA-256 or better"},
		{"when the modulus is short", rsaEK(n[1:], nil), "modulus"},
		{"when the modulus has leading zeros", rsaEK(small, nil), "modulus"},
		{"when the modulus is even", rsaEK(even, nil), "modulus"},
		{"when the modulus is empty", rsaEK(nil, nil), "modulus"},
		{"when the modulus is longer than its bits", rsaEK(append([]byte{1}, n...), nil), "modulus"},
		{"when the key has 1024 bits", rsaEK(n[:128], func(p *tpm2.TPMSRSAParms) { p.KeyBits = 1024 }), "1024 bits"},
		{"when the key has 16384 bits", rsaEK(n, func(p *tpm2.TPMSRSAParms) { p.KeyBits = 16384 }), "16384 bits"},
		{"when the exponent is 3", rsaEK(n, func(p *tpm2.TPMSRSAParms) { p.Exponent = 3 }), "exponent 3"},
		{"when it is no asymmetric key", keyedHash, "neither RSA nor ECC"},
	} {
		t.Run(c.when, func(t *testing.T) {
			k, err := tpm.ParsePublic(c.in)
			if err == nil {
				t.Fatalf("no error: %+v", k)
			}
			if !strings.Contains(err.Error(), c.want) || k.Raw != nil {
				t.Errorf("error %q, want one about %q; key %+v", err, c.want, k)
			}
		})
	}
	for x[0] != 0 { // a key whose X begins with a zero, as 1 in 256 does
		x, y = point(t, softKey(t, elliptic.P256()))
	}
	stripped := withPoint(tpm.AKTemplate(0), x[1:], y)
	if _, err := tpm.ParsePublic(stripped); err != nil {
		t.Errorf("a TPM that drops leading zeros: %v", err)
	}
}

func attest(kind tpm2.TPMST) tpm2.TPMSAttest {
	a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: kind, ExtraData: tpm2.TPM2BData{Buffer: make([]byte, 32)}}
	switch kind {
	case tpm2.TPMSTAttestCertify:
		a.Attested = tpm2.NewTPMUAttest(kind, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: make([]byte, 34)}})
	case tpm2.TPMSTAttestQuote:
		a.Attested = tpm2.NewTPMUAttest(kind, &tpm2.TPMSQuoteInfo{PCRSelect: tpm2.TPMLPCRSelection{
			PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0x95, 0x1a, 0}}}}})
	case tpm2.TPMSTAttestTime:
		a.Attested = tpm2.NewTPMUAttest(kind, &tpm2.TPMSTimeAttestInfo{})
	}
	return a
}

func ecdsaSignature() []byte {
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: []byte{1}}, SignatureS: tpm2.TPM2BECCParameter{Buffer: []byte{2}}})})
}

func rsaSignature() []byte {
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
		&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)}})})
}

func TestParseStatements(t *testing.T) {
	certify, quote := tpm2.Marshal(attest(tpm2.TPMSTAttestCertify)), tpm2.Marshal(attest(tpm2.TPMSTAttestQuote))
	sig := ecdsaSignature()
	s, err := tpm.ParseQuote(quote, sig)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Quoted.PCRSelection[pki.AlgSHA256], pki.QuotePCRs) {
		t.Errorf("selection %v, want %v", s.Quoted.PCRSelection, pki.QuotePCRs)
	}
	if s, err = tpm.ParseCertify(certify, rsaSignature()); err != nil || s.Signature.Alg != pki.AlgRSASSA {
		t.Errorf("RSA signature: %+v, %v", s.Signature, err)
	}
	twice := attest(tpm2.TPMSTAttestQuote)
	sel := tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{1, 0, 0}}
	twice.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{sel, sel}}})
	wrongMagic := bytes.Clone(certify)
	wrongMagic[0] ^= 1
	endless := bytes.Clone(quote)
	copy(endless[len(endless)-2-6-4:], []byte{0xff, 0xff, 0xff, 0xff})
	null := binary.BigEndian.AppendUint16(nil, 0x10)
	hmac := append([]byte{0, 5, 0, 0xB}, make([]byte, 32)...)
	for _, c := range []struct {
		when        string
		parse       func(a, s []byte) (pki.Statement, error)
		attest, sig []byte
	}{
		{"when a quote is where a certify should be", tpm.ParseCertify, quote, sig},
		{"when a certify is where a quote should be", tpm.ParseQuote, certify, sig},
		{"when it is a statement about time", tpm.ParseQuote, tpm2.Marshal(attest(tpm2.TPMSTAttestTime)), sig},
		{"when the magic is wrong", tpm.ParseCertify, wrongMagic, sig},
		{"when bytes follow", tpm.ParseCertify, append(bytes.Clone(certify), 1), sig},
		{"when bytes follow the signature", tpm.ParseCertify, certify, append(bytes.Clone(sig), 1)},
		{"when it is cut", tpm.ParseQuote, quote[:len(quote)-1], sig},
		{"when it is empty", tpm.ParseQuote, nil, sig},
		{"when the signature is empty", tpm.ParseQuote, quote, nil},
		{"when the signature has no scheme", tpm.ParseQuote, quote, null},
		{"when the signature is an HMAC", tpm.ParseQuote, quote, hmac},
		{"when the signature is of an unknown scheme", tpm.ParseQuote, quote, []byte{0x77, 0x77, 0, 11}},
		{"when a bank is there twice", tpm.ParseQuote, tpm2.Marshal(twice), sig},
		{"when the list of banks is endless", tpm.ParseQuote, endless, sig},
		{"when the statement is huge", tpm.ParseQuote, make([]byte, 1<<20), sig},
		{"when the signature is huge", tpm.ParseQuote, quote, make([]byte, 1<<20)},
	} {
		t.Run(c.when, func(t *testing.T) {
			if s, err := c.parse(c.attest, c.sig); err == nil || s.Raw != nil {
				t.Errorf("no error: %+v", s)
			}
		})
	}
}

func TestMakeCredentialWhenThenError(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	parse := func(b []byte) pki.Key {
		k, err := tpm.ParsePublic(b)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	ek := parse(rsaEK(rsaKey.N.Bytes(), nil))
	name, secret := parse(goodAK(t)).Name, make([]byte, 32)
	blob, enc, err := tpm.MakeCredential(rand.Reader, ek, name, secret)
	if err != nil || len(enc) != 2+256 || len(blob) == 0 {
		t.Fatalf("%d, %d bytes, %v", len(blob), len(enc), err)
	}
	noSymmetric := rsaEK(rsaKey.N.Bytes(), func(p *tpm2.TPMSRSAParms) { p.Symmetric = tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull} })
	withScheme := rsaEK(rsaKey.N.Bytes(), func(p *tpm2.TPMSRSAParms) {
		p.Scheme = tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgOAEP, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA1})}
	})
	oddAES := rsaEK(rsaKey.N.Bytes(), func(p *tpm2.TPMSRSAParms) {
		p.Symmetric.KeyBits = tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(127))
	})
	cbc := rsaEK(rsaKey.N.Bytes(), func(p *tpm2.TPMSRSAParms) {
		p.Symmetric.Mode = tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCBC)
	})
	for _, c := range []struct {
		when         string
		ek           pki.Key
		name, secret []byte
	}{
		{"when the EK is a signing key", parse(goodAK(t)), name, secret},
		{"when the EK has no symmetric cipher", parse(noSymmetric), name, secret},
		{"when the EK has a scheme", parse(withScheme), name, secret},
		{"when the EK's cipher has 127 bits", parse(oddAES), name, secret},
		{"when the EK's cipher mode is CBC", parse(cbc), name, secret},
		{"when the EK is empty", pki.Key{}, name, secret},
		{"when the name is empty", ek, nil, secret},
		{"when the name is endless", ek, make([]byte, 1000), secret},
		{"when the secret is empty", ek, name, nil},
		{"when the secret is too long", ek, name, make([]byte, 33)},
	} {
		t.Run(c.when, func(t *testing.T) {
			if blob, enc, err := tpm.MakeCredential(rand.Reader, c.ek, c.name, c.secret); err == nil || blob != nil || enc != nil {
				t.Errorf("no error: %x, %x", blob, enc)
			}
		})
	}
}

func TestSplitSized(t *testing.T) {
	if b, err := tpm.SplitSized([]byte{0, 2, 7, 8}, 10); err != nil || !bytes.Equal(b, []byte{7, 8}) {
		t.Errorf("%x, %v", b, err)
	}
	for _, bad := range [][]byte{nil, {0}, {0, 1}, {0, 1, 2, 3}, make([]byte, 11)} {
		if b, err := tpm.SplitSized(bad, 10); err == nil {
			t.Errorf("%x gives %x", bad, b)
		}
	}
}

func FuzzParsePublic(f *testing.F) {
	f.Add(goodAK(f))
	f.Add(tpm2.Marshal(tpm2.RSAEKTemplate))
	f.Add(tpm2.Marshal(tpm2.ECCEKTemplate))
	f.Add([]byte{0, 0x23, 0, 0xB})
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := tpm.ParsePublic(b)
		if err != nil {
			return
		}
		if !bytes.Equal(k.Raw, b) || k.Public == nil {
			t.Fatalf("%x gives %+v", b, k)
		}
		name, err := pki.ComputeName(k.Raw)
		if err != nil || !bytes.Equal(name, k.Name) {
			t.Fatalf("name of %x: %x, %v", b, name, err)
		}
		_, _, _ = tpm.MakeCredential(rand.Reader, k, k.Name, []byte("secret"))
	})
}

func FuzzParseCertify(f *testing.F) {
	f.Add(tpm2.Marshal(attest(tpm2.TPMSTAttestCertify)), ecdsaSignature())
	f.Add(tpm2.Marshal(attest(tpm2.TPMSTAttestTime)), rsaSignature())
	f.Fuzz(func(t *testing.T, a, s []byte) {
		if st, err := tpm.ParseCertify(a, s); err == nil && !bytes.Equal(st.Raw, a) {
			t.Fatal("raw bytes are others")
		}
	})
}

func FuzzParseQuote(f *testing.F) {
	f.Add(tpm2.Marshal(attest(tpm2.TPMSTAttestQuote)), ecdsaSignature())
	f.Add(tpm2.Marshal(attest(tpm2.TPMSTAttestCertify)), rsaSignature())
	f.Fuzz(func(t *testing.T, a, s []byte) {
		st, err := tpm.ParseQuote(a, s)
		if err != nil {
			return
		}
		for bank, pcrs := range st.Quoted.PCRSelection {
			if !slices.IsSorted(pcrs) || len(pcrs) > 2040 {
				t.Fatalf("bank %x: %v", bank, pcrs)
			}
		}
	})
}
