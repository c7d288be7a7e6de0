package service_test

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

// softTPM says what a TPM says, with keys in memory: real messages at a
// thousandth of swtpm's price, for tests with hundreds of machines. swtpm and
// the chain tests are what proves that a TPM says the same.
type softTPM struct {
	ek         *ecdh.PrivateKey
	ak, ldevid *ecdsa.PrivateKey
	ekPub      []byte
	akPub      []byte
	ldevidPub  []byte
	pcrs       map[int][]byte
}

func point(p []byte) tpm2.TPMUPublicID {
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: p[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: p[33:]}})
}

func newSoftTPM(t testing.TB) *softTPM {
	s := &softTPM{pcrs: map[int][]byte{}}
	var err error
	s.ek, err = ecdh.P256().GenerateKey(rand.Reader)
	must(t, err)
	s.ak, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	s.ldevid, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	public := func(template tpm2.TPMTPublic, p []byte) []byte {
		template.Unique = point(p)
		return tpm2.Marshal(template)
	}
	bytesOf := func(k *ecdsa.PrivateKey) []byte {
		b, err := k.PublicKey.Bytes()
		must(t, err)
		return b
	}
	s.ekPub = public(tpm2.ECCEKTemplate, s.ek.PublicKey().Bytes())
	s.akPub = public(tpm.AKTemplate(0), bytesOf(s.ak))
	s.ldevidPub = public(tpm.LDevIDTemplate(0), bytesOf(s.ldevid))
	for _, i := range pki.QuotePCRs {
		v := sha256.Sum256([]byte{byte(i)})
		s.pcrs[i] = v[:]
	}
	return s
}

func name(public []byte) []byte {
	h := sha256.Sum256(public)
	return append([]byte{0, 0x0b}, h[:]...)
}

// qualified is the name of a primary key of the owner hierarchy, which tells
// where it hangs (Part 1 section 16).
func qualified(public []byte) []byte {
	h := sha256.Sum256(append([]byte{0x40, 0, 0, 1}, name(public)...))
	return append([]byte{0, 0x0b}, h[:]...)
}

func (s *softTPM) begin() *musterv1.BeginRequest {
	return &musterv1.BeginRequest{Protocol: 1, Eks: []*musterv1.EndorsementKey{{Public: s.ekPub}}, AkPublic: s.akPub, LdevidPublic: s.ldevidPub}
}

// activate is TPM2_ActivateCredential (TPM 2.0 Library Part 1 section 24).
func (s *softTPM) activate(blob, encrypted []byte) ([]byte, error) {
	eph, err := tpm2.Unmarshal[tpm2.TPM2BEncryptedSecret](encrypted)
	if err != nil {
		return nil, err
	}
	p, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](eph.Buffer)
	if err != nil {
		return nil, err
	}
	pad := func(b []byte) []byte { return append(make([]byte, 32-len(b)), b...) }
	peer, err := ecdh.P256().NewPublicKey(append(append([]byte{4}, pad(p.X.Buffer)...), pad(p.Y.Buffer)...))
	if err != nil {
		return nil, err
	}
	z, err := s.ek.ECDH(peer)
	if err != nil {
		return nil, err
	}
	seed := tpm2.KDFe(crypto.SHA256, z, "IDENTITY", pad(p.X.Buffer), s.ek.PublicKey().Bytes()[1:33], 256)
	object, err := tpm2.Unmarshal[tpm2.TPM2BIDObject](blob)
	if err != nil {
		return nil, err
	}
	mac, err := tpm2.Unmarshal[tpm2.TPM2BDigest](object.Buffer)
	if err != nil {
		return nil, err
	}
	sealed := object.Buffer[2+len(mac.Buffer):]
	h := hmac.New(sha256.New, tpm2.KDFa(crypto.SHA256, seed, "INTEGRITY", nil, nil, 256))
	h.Write(sealed)
	h.Write(name(s.akPub))
	if !hmac.Equal(h.Sum(nil), mac.Buffer) {
		return nil, errors.New("integrity")
	}
	block, err := aes.NewCipher(tpm2.KDFa(crypto.SHA256, seed, "STORAGE", name(s.akPub), nil, 128))
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(sealed))
	//lint:ignore SA1019 TPMs protect secrets by CFB and an HMAC (TPM 2.0 Library, part 1, 24)
	cipher.NewCFBDecrypter(block, make([]byte, 16)).XORKeyStream(plain, sealed)
	out, err := tpm2.Unmarshal[tpm2.TPM2BDigest](plain)
	if err != nil {
		return nil, err
	}
	return out.Buffer, nil
}

// sign makes an attestation statement and the AK's signature.
func (s *softTPM) sign(kind tpm2.TPMST, what tpm2.TPMUAttest, extra []byte) (attest, signature []byte, err error) {
	attest = tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: kind, QualifiedSigner: tpm2.TPM2BName{Buffer: qualified(s.akPub)},
		ExtraData: tpm2.TPM2BData{Buffer: extra}, ClockInfo: tpm2.TPMSClockInfo{Clock: 1000, ResetCount: 1, RestartCount: 0, Safe: true}, FirmwareVersion: 1, Attested: what,
	})
	digest := sha256.Sum256(attest)
	der, err := ecdsa.SignASN1(rand.Reader, s.ak, digest[:])
	if err != nil {
		return nil, nil, err
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		return nil, nil, err
	}
	signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.FillBytes(make([]byte, 32))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.FillBytes(make([]byte, 32))},
	})})
	return attest, signature, nil
}

// complete answers a challenge on the connection with this exporter.
func (s *softTPM) complete(challenge *musterv1.BeginResponse, exporter []byte) (*musterv1.CompleteRequest, error) {
	secret, err := s.activate(challenge.CredentialBlob, challenge.EncryptedSecret)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, s.ldevid)
	if err != nil {
		return nil, err
	}
	ek, err := x509.MarshalPKIXPublicKey(s.ek.PublicKey())
	if err != nil {
		return nil, err
	}
	hardware := []byte(`{"serial":"S1"}`)
	transcript := enroll.Transcript(enroll.TranscriptFields{Nonce: challenge.Nonce, EK: ek, AK: s.akPub, LDevID: s.ldevidPub, CSR: csr, Hardware: hardware, Exporter: exporter})
	m := &musterv1.CompleteRequest{Cookie: challenge.Cookie, Proof: enroll.Proof(secret, transcript), Csr: csr, Hardware: hardware}
	m.CertifyAttest, m.CertifySignature, err = s.sign(tpm2.TPMSTAttestCertify, tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{
		Name: tpm2.TPM2BName{Buffer: name(s.ldevidPub)}, QualifiedName: tpm2.TPM2BName{Buffer: qualified(s.ldevidPub)},
	}), transcript[:])
	if err != nil {
		return nil, err
	}
	sel := make([]byte, 3)
	var all bytes.Buffer
	for _, i := range pki.QuotePCRs {
		sel[i/8] |= 1 << (i % 8)
		all.Write(s.pcrs[i])
		m.Pcrs = append(m.Pcrs, &musterv1.PcrValue{Index: uint32(i), Sha256: s.pcrs[i]})
	}
	digest := sha256.Sum256(all.Bytes())
	m.QuoteAttest, m.QuoteSignature, err = s.sign(tpm2.TPMSTAttestQuote, tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: sel}}}, PCRDigest: tpm2.TPM2BDigest{Buffer: digest[:]},
	}), transcript[:])
	return m, err
}
