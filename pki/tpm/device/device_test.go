package device_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func open(t *testing.T, s *swtpmtest.TPM) *device.Device {
	t.Helper()
	d, err := device.Open(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func raw(t *testing.T, s *swtpmtest.TPM) transport.TPMCloser {
	t.Helper()
	r, err := linuxudstpm.Open(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func identity(t *testing.T, d *device.Device) device.Identity {
	t.Helper()
	id, err := d.Identity(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func parse(t *testing.T, public []byte) pki.Key {
	t.Helper()
	k, err := tpm.ParsePublic(public)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func activate(t *testing.T, d *device.Device, ek, ak pki.Key) {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	blob, enc, err := tpm.MakeCredential(rand.Reader, ek, ak.Name, secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := d.ActivateCredential(blob, enc)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, secret) {
		t.Fatal("another secret came back")
	}
	// The negative twin: the same credential for another name.
	other := bytes.Clone(ak.Name)
	other[10] ^= 1
	blob, enc, err = tpm.MakeCredential(rand.Reader, ek, other, secret)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ActivateCredential(blob, enc); err == nil {
		t.Fatal("a credential for another key was activated")
	}
}

func TestEnrollmentSteps(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	d := open(t, s)
	id := identity(t, d)
	if len(id.Problems) != 0 {
		t.Errorf("problems: %v", id.Problems)
	}
	if len(id.EKs) != 2 {
		t.Fatalf("%d EKs, want RSA-2048 and P-384", len(id.EKs))
	}
	rsa, p384 := parse(t, id.EKs[0].Public), parse(t, id.EKs[1].Public)
	if rsa.Type != "rsa" || rsa.Bits != 2048 || p384.Curve != "P-384" {
		t.Fatalf("EKs are %s %d and %s", rsa.Type, rsa.Bits, p384.Curve)
	}
	for i, ek := range id.EKs {
		if len(ek.Certificate) < 500 {
			t.Errorf("EK %d: certificate of %d bytes", i, len(ek.Certificate))
		}
	}
	ak, ldevid := parse(t, id.AKPublic), parse(t, id.LDevIDPublic)
	if ak.Attributes != pki.AKAttributes || ldevid.Attributes != pki.LDevIDAttributes {
		t.Errorf("attributes 0x%x, 0x%x", ak.Attributes, ldevid.Attributes)
	}
	activate(t, d, rsa, ak)

	transcript := sha256.Sum256([]byte("transcript"))
	attest, sig, err := d.Certify(transcript)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.ParseCertify(attest, sig); err != nil {
		t.Fatal(err)
	}
	attest, sig, values, err := d.Quote(transcript, pki.QuotePCRs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.ParseQuote(attest, sig); err != nil {
		t.Fatal(err)
	}
	if len(values) != len(pki.QuotePCRs) {
		t.Errorf("%d PCR values", len(values))
	}
	vendor, model, firmware, err := d.Properties()
	if err != nil || vendor != "IBM" || model == "" || firmware == "" {
		t.Errorf("properties %q %q %q, %v", vendor, model, firmware, err)
	}
	if left := transientHandles(t, s); left > 2 {
		t.Errorf("%d transient objects stay loaded, want AK and LDevID only", left)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if left := transientHandles(t, s); left != 0 {
		t.Errorf("%d transient objects after Close", left)
	}
}

func transientHandles(t *testing.T, s *swtpmtest.TPM) int {
	t.Helper()
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: 0x80000000, PropertyCount: 16}.Execute(raw(t, s))
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.CapabilityData.Data.Handles()
	if err != nil {
		t.Fatal(err)
	}
	return len(h.Handle)
}

func TestSigner(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	d := open(t, s)
	key := d.Signer()
	digest := sha256.Sum256([]byte("to be signed"))

	// Many at once: the TPM does one thing at a time.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	if err := parsed.CheckSignature(); err != nil {
		t.Fatal(err)
	}

	for _, bad := range []struct {
		when   string
		digest []byte
		opts   crypto.SignerOpts
	}{
		{"when the hash is SHA-384", make([]byte, 48), crypto.SHA384},
		{"when the digest is short", make([]byte, 31), crypto.SHA256},
		{"when there is no hash", digest[:], crypto.Hash(0)},
		{"when there are no options", digest[:], nil},
	} {
		if _, err := key.Sign(rand.Reader, bad.digest, bad.opts); err == nil {
			t.Errorf("%s then no error", bad.when)
		}
	}
}

func TestSignerWhenTheTPMLosesItsKeysThenTheyAreMadeAgain(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{NoCertificate: true})
	d := open(t, s)
	key := d.Signer()
	digest := sha256.Sum256([]byte("to be signed"))
	sign := func(when string) {
		t.Helper()
		if _, err := key.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	sign("at first")
	before := key.Public()
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	sign("after a power cycle")
	if eq, ok := before.(interface{ Equal(crypto.PublicKey) bool }); !ok || !eq.Equal(key.Public()) {
		t.Fatal("the key changed")
	}
	// Another user of the raw TPM flushes our objects and loads his own.
	other := open(t, s)
	if _, err := other.Signer().Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	sign("after another user came")

	// All slots are taken by somebody.
	r := raw(t, s)
	for {
		_, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
		}.Execute(r)
		if errors.Is(err, tpm2.TPMRCObjectMemory) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	transcript := sha256.Sum256([]byte("transcript"))
	if _, _, err := d.Certify(transcript); err != nil {
		t.Fatalf("with all slots taken: %v", err)
	}
}

// names reads what makes a machine recognisable.
func names(t *testing.T, s *swtpmtest.TPM) (ek, ak, ldevid string) {
	t.Helper()
	d, err := device.Open(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	id := identity(t, d)
	return string(parse(t, id.EKs[0].Public).Name), string(parse(t, id.AKPublic).Name), string(parse(t, id.LDevIDPublic).Name)
}

func TestNamesLiveAsLongAsTheOwnerSeed(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	ek, ak, ldevid := names(t, s)
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	ek2, ak2, ldevid2 := names(t, s)
	if ek != ek2 || ak != ak2 || ldevid != ldevid2 {
		t.Fatal("names changed with a power cycle")
	}
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(raw(t, s)); err != nil {
		t.Fatal(err)
	}
	ek3, ak3, ldevid3 := names(t, s)
	if ek != ek3 {
		t.Error("TPM2_Clear changed the EK")
	}
	if ak == ak3 || ldevid == ldevid3 {
		t.Error("TPM2_Clear left AK or LDevID")
	}
	if ak == ldevid {
		t.Error("AK and LDevID are one key")
	}
}
