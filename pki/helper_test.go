package pki_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

var (
	now        = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	floor      = time.Date(2026, 10, 1, 0, 0, 0, 0, time.UTC)
	transcript = sha256.Sum256([]byte("transcript"))
	owner      = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
)

// machine is a software TPM and what it shows in an enrollment.
type machine struct {
	swtpm  *swtpmtest.TPM
	device *device.Device
	id     device.Identity
}

func newMachine(t *testing.T, o swtpmtest.Options) *machine {
	t.Helper()
	m := &machine{swtpm: swtpmtest.Start(t, o)}
	d, err := device.Open(m.swtpm.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	m.device = d
	m.read(t)
	return m
}

func (m *machine) read(t *testing.T) {
	t.Helper()
	var err error
	if m.id, err = m.device.Identity(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) raw(t *testing.T) transport.TPM {
	t.Helper()
	r, err := linuxudstpm.Open(m.swtpm.Path())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// evidence goes the way of an honest enrollment.
func (m *machine) evidence(t *testing.T) pki.Evidence {
	t.Helper()
	ev := pki.Evidence{Transcript: transcript, AK: parsePublic(t, m.id.AKPublic), LDevID: parsePublic(t, m.id.LDevIDPublic)}
	for _, blob := range m.id.EKs {
		ek := pki.EndorsementKey{Key: parsePublic(t, blob.Public)}
		if blob.Certificate != nil {
			ek.Certificate, ek.CertificateError = ekcert.ParseCertificate(blob.Certificate)
		}
		for _, der := range blob.Chain {
			c, err := ekcert.ParseIntermediate(der)
			if err != nil {
				t.Fatal(err)
			}
			ek.Intermediates = append(ek.Intermediates, c)
		}
		ev.EKs = append(ev.EKs, ek)
	}
	attest, sig, err := m.device.Certify(transcript)
	if err != nil {
		t.Fatal(err)
	}
	ev.Certify = parseCertify(t, attest, sig)
	attest, sig, values, err := m.device.Quote(transcript, pki.QuotePCRs)
	if err != nil {
		t.Fatal(err)
	}
	ev.Quote, ev.PCRs = parseQuote(t, attest, sig), values
	ev.CSRKey = m.device.Signer().Public()
	return ev
}

// measure extends the TPM as the firmware did that wrote the log.
func (m *machine) measure(t *testing.T, log []pki.LogEvent) {
	t.Helper()
	r := m.raw(t)
	for _, e := range log {
		if e.Type == 3 {
			continue
		}
		if _, err := (tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:]},
			}},
		}).Execute(r); err != nil {
			t.Fatal(err)
		}
	}
}

func parsePublic(t testing.TB, b []byte) pki.Key {
	t.Helper()
	k, err := tpm.ParsePublic(b)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func parseCertify(t testing.TB, attest, sig []byte) pki.Statement {
	t.Helper()
	s, err := tpm.ParseCertify(attest, sig)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func parseQuote(t testing.TB, attest, sig []byte) pki.Statement {
	t.Helper()
	s, err := tpm.ParseQuote(attest, sig)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// soft is a machine made of software keys: what an attacker without a TPM
// has, and, since Verify cannot know, what fast tests use. Its identity can
// only be unverified or listed.
type soft struct {
	ek         *rsa.PrivateKey
	ak, ldevid *ecdsa.PrivateKey
}

var newSoft = sync.OnceValue(func() *soft {
	ek, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return &soft{ek: ek, ak: softKey(), ldevid: softKey()}
})

func softKey() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

// rsaPublic is a TPMT_PUBLIC for an RSA key as an EK has it.
func rsaPublic(pub *rsa.PublicKey) []byte {
	t := tpm2.RSAEKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: pub.N.Bytes()})
	return tpm2.Marshal(t)
}

// eccPublic is a TPMT_PUBLIC from a template with this key.
func eccPublic(template tpm2.TPMTPublic, pub *ecdsa.PublicKey) []byte {
	point, err := pub.Bytes()
	if err != nil {
		panic(err)
	}
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return tpm2.Marshal(template)
}

// evidence is well formed in all parts.
func (s *soft) evidence(t testing.TB, pcrs map[int][]byte, log []pki.LogEvent) pki.Evidence {
	t.Helper()
	ev := pki.Evidence{
		Transcript: transcript,
		EKs:        []pki.EndorsementKey{{Key: parsePublic(t, rsaPublic(&s.ek.PublicKey))}},
		AK:         parsePublic(t, eccPublic(tpm.AKTemplate(0), &s.ak.PublicKey)),
		LDevID:     parsePublic(t, eccPublic(tpm.LDevIDTemplate(0), &s.ldevid.PublicKey)),
		PCRs:       map[int][]byte{},
		Log:        log,
		CSRKey:     &s.ldevid.PublicKey,
	}
	h := sha256.New()
	for _, i := range pki.QuotePCRs {
		ev.PCRs[i] = pcrs[i]
		if pcrs[i] == nil {
			ev.PCRs[i] = make([]byte, 32)
		}
		h.Write(ev.PCRs[i])
	}
	ev.Certify = s.sign(t, certifyAttest(ev.AK.Name, ev.LDevID.Name))
	ev.Quote = s.sign(t, quoteAttest(ev.AK.Name, h.Sum(nil), tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: selectBits(pki.QuotePCRs...)}))
	return ev
}

func selectBits(pcrs ...int) []byte {
	b := make([]byte, 3)
	for _, i := range pcrs {
		b[i/8] |= 1 << (i % 8)
	}
	return b
}

func attestHeader(kind tpm2.TPMST, akName []byte) tpm2.TPMSAttest {
	return tpm2.TPMSAttest{
		Magic:           tpm2.TPMGeneratedValue,
		Type:            kind,
		QualifiedSigner: tpm2.TPM2BName{Buffer: pki.OwnerQualifiedName(akName)},
		ExtraData:       tpm2.TPM2BData{Buffer: transcript[:]},
		ClockInfo:       tpm2.TPMSClockInfo{Clock: 1000, ResetCount: 2, RestartCount: 3, Safe: true},
		FirmwareVersion: 4,
	}
}

func certifyAttest(akName, name []byte) tpm2.TPMSAttest {
	a := attestHeader(tpm2.TPMSTAttestCertify, akName)
	a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{
		Name:          tpm2.TPM2BName{Buffer: name},
		QualifiedName: tpm2.TPM2BName{Buffer: pki.OwnerQualifiedName(name)},
	})
	return a
}

func quoteAttest(akName, digest []byte, selection ...tpm2.TPMSPCRSelection) tpm2.TPMSAttest {
	a := attestHeader(tpm2.TPMSTAttestQuote, akName)
	a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: selection},
		PCRDigest: tpm2.TPM2BDigest{Buffer: digest},
	})
	return a
}

// sign signs a statement as the software AK.
func (s *soft) sign(t testing.TB, a tpm2.TPMSAttest) pki.Statement {
	t.Helper()
	attest := tpm2.Marshal(a)
	sig := softSignature(s.ak, attest)
	if a.Type == tpm2.TPMSTAttestQuote {
		return parseQuote(t, attest, sig)
	}
	return parseCertify(t, attest, sig)
}

func softSignature(key *ecdsa.PrivateKey, attest []byte) []byte {
	digest := sha256.Sum256(attest)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		panic(err)
	}
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
		}),
	})
}

// golden reads a real boot's log and PCRs.
func golden(t testing.TB, name string) ([]pki.LogEvent, map[int][]byte) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("ekcert", "testdata", name+".bin"))
	if err != nil {
		t.Fatal(err)
	}
	log, err := ekcert.ParseEventLog(b)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join("ekcert", "testdata", name+".pcrs"))
	if err != nil {
		t.Fatal(err)
	}
	pcrs := map[int][]byte{}
	for line := range strings.Lines(string(text)) {
		var i int
		var v string
		if _, err := fmt.Sscan(line, &i, &v); err != nil {
			t.Fatal(err)
		}
		pcrs[i] = unhex(v)
	}
	return log, pcrs
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// goldenImage is the image that all golden logs booted.
func goldenImage() fleet.Image {
	return fleet.Image{
		Name: "recovery", Version: "1.0.0",
		Authenticode: unhex("45a687277bdda3e24e3a6302d427c3e5695a5f28fa88613b21a2a2b0b705d0f9"),
		Kernel:       unhex(goldenKernel),
		PCR11:        unhex("2f4c26e3ef3e2ed090f13966d3413fed403e21f3bc093f8b0ec75982bbcb1f97"),
		SignerCert:   unhex("282e8130b7070f107aaecc25d3992ca4440270860b09088792a5075fab0d13f8"),
	}
}

// refused checks that Verify refuses with this check, and trusts nothing.
func refused(t *testing.T, ev pki.Evidence, check string) {
	t.Helper()
	v, err := pki.Verify(ev, pki.Policy{Now: now, TimeFloor: floor})
	r, ok := err.(*pki.Refusal)
	if !ok {
		t.Fatalf("not refused: %v", err)
	}
	if r.Check != check {
		t.Fatalf("refused for %q (%s), want %q", r.Check, r.Detail, check)
	}
	if v.Identity != fleet.IdentityUnverified || v.Boot != fleet.BootUnknown || v.EK != (fleet.EKHash{}) {
		t.Fatalf("a refusal came with trust: %+v", v)
	}
	if n := len(v.Findings); n == 0 || v.Findings[n-1].OK || v.Findings[n-1].Check != check {
		t.Fatalf("findings do not end with the refusal: %+v", v.Findings)
	}
}

func verify(t testing.TB, ev pki.Evidence, pol pki.Policy) pki.Verdict {
	t.Helper()
	if pol.Now.IsZero() {
		pol.Now, pol.TimeFloor = now, floor
	}
	v, err := pki.Verify(ev, pol)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func pool(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func clonePCRs(m map[int][]byte) map[int][]byte {
	out := maps.Clone(m)
	for i := range out {
		out[i] = bytes.Clone(out[i])
	}
	return out
}
