package pki_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/ekcert"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

func newCA(t testing.TB, intermediate bool) *swtpmtest.CA {
	t.Helper()
	ca, err := swtpmtest.OpenCA(t.TempDir(), intermediate)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func certify(t testing.TB, ca *swtpmtest.CA, public any, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	der, err := ca.Certify(public, edit)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ekcert.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// criticalSAN names a TPM as EK certificates do.
func criticalSAN(t testing.TB) pkix.Extension {
	t.Helper()
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value string `asn1:"utf8"`
	}
	names, err := asn1.Marshal([]asn1.RawValue{set(t, attribute{asn1.ObjectIdentifier{2, 23, 133, 2, 1}, "id:49465800"}),
		set(t, attribute{asn1.ObjectIdentifier{2, 23, 133, 2, 2}, "SLB9670"}), set(t, attribute{asn1.ObjectIdentifier{2, 23, 133, 2, 3}, "id:0007"})})
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: names}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}
}

func set(t testing.TB, v any) asn1.RawValue {
	t.Helper()
	b, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSet, IsCompound: true, Bytes: b}
}

func TestVerifyIdentity(t *testing.T) {
	s := newSoft()
	hash, err := fleet.HashEK(&s.ek.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	vendor, lab, nobody, deep := newCA(t, false), newCA(t, false), newCA(t, false), newCA(t, true)
	base := s.evidence(t, nil, nil)
	type setup struct {
		ca            *swtpmtest.CA
		edit          func(*x509.Certificate)
		intermediates []*x509.Certificate
		policy        func(*pki.Policy)
	}
	at := func(now, floor time.Time) func(*pki.Policy) {
		return func(p *pki.Policy) { p.Now, p.TimeFloor = now, floor }
	}
	day := 24 * time.Hour
	for _, c := range []struct {
		when string
		setup
		want fleet.IdentityTrust
		why  string
	}{
		{"when a vendor root vouches then hardware", setup{ca: vendor}, fleet.IdentityHardware, ""},
		{"when a lab root vouches then lab", setup{ca: lab}, fleet.IdentityLab, ""},
		{"when nobody known vouches then unverified", setup{ca: nobody}, fleet.IdentityUnverified, "to no vendor root"},
		{"when there is no certificate then unverified", setup{}, fleet.IdentityUnverified, "holds none"},
		{"when there is no certificate and the EK is listed then listed", setup{policy: func(p *pki.Policy) {
			p.Listed = func(h fleet.EKHash) bool { return h == hash }
		}}, fleet.IdentityListed, ""},
		{"when nobody vouches and the EK is listed then listed", setup{ca: nobody, policy: func(p *pki.Policy) {
			p.Listed = func(h fleet.EKHash) bool { return h == hash }
		}}, fleet.IdentityListed, ""},
		{"when a vendor root vouches and the EK is listed then hardware", setup{ca: vendor, policy: func(p *pki.Policy) {
			p.Listed = func(fleet.EKHash) bool { return true }
		}}, fleet.IdentityHardware, ""},
		{"when another EK is listed then unverified", setup{ca: nobody, policy: func(p *pki.Policy) {
			p.Listed = func(h fleet.EKHash) bool { return h != hash }
		}}, fleet.IdentityUnverified, "on no list"},
		{"when the store is empty then unverified", setup{ca: vendor, policy: func(p *pki.Policy) { p.VendorRoots, p.LabRoots = nil, nil }}, fleet.IdentityUnverified, "no vendor roots"},

		{"when the intermediate came from the TPM then hardware", setup{ca: deep, intermediates: []*x509.Certificate{deep.Issuer}}, fleet.IdentityHardware, ""},
		{"when the intermediate is the centre's then hardware", setup{ca: deep, policy: func(p *pki.Policy) {
			p.Intermediates = []*x509.Certificate{deep.Issuer}
		}}, fleet.IdentityHardware, ""},
		{"when the intermediate is missing then unverified", setup{ca: deep}, fleet.IdentityUnverified, "unknown authority"},
		{"when the TPM brings its own root then unverified", setup{ca: nobody, intermediates: []*x509.Certificate{nobody.Root}}, fleet.IdentityUnverified, "to no vendor root"},
		{"when only the intermediate is known then unverified", setup{ca: deep, policy: func(p *pki.Policy) {
			p.VendorRoots, p.Intermediates = pool(vendor.Root), []*x509.Certificate{deep.Issuer}
		}}, fleet.IdentityUnverified, "unknown authority"},
		{"when an intermediate is nil then it is passed over", setup{ca: vendor, intermediates: []*x509.Certificate{nil}}, fleet.IdentityHardware, ""},

		{"when the subjectAltName is critical then hardware", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, criticalSAN(t))
		}}, fleet.IdentityHardware, ""},
		{"when an unknown extension is critical then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, criticalSAN(t), pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
		}}, fleet.IdentityUnverified, "unhandled critical extension"},
		{"when the leaf is a CA then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) { c.IsCA = true }}, fleet.IdentityUnverified, "CA certificate"},
		{"when the key may sign certificates then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }}, fleet.IdentityUnverified, "may sign certificates"},
		{"when the usage is another then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}}, fleet.IdentityUnverified, "extended key usage"},
		{"when any usage is allowed then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}}, fleet.IdentityUnverified, "extended key usage"},
		{"when the list of usages is empty then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = nil
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0}})
		}}, fleet.IdentityUnverified, "extended key usage"},
		{"when there is no extended key usage then hardware", setup{ca: vendor, edit: func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }}, fleet.IdentityHardware, ""},

		{"when it ended before the floor then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = floor.Add(-9*day), floor.Add(-day)
		}}, fleet.IdentityUnverified, "before the time floor"},
		{"when it ended after the floor and before now then hardware", setup{ca: vendor, edit: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = floor.Add(-9*day), floor.Add(day)
		}}, fleet.IdentityHardware, ""},
		{"when it begins in the future then hardware", setup{ca: vendor, edit: func(c *x509.Certificate) { c.NotBefore = now.Add(400 * day) }}, fleet.IdentityHardware, ""},
		{"when the clock says 1970 then hardware", setup{ca: vendor, policy: at(time.Unix(0, 0), floor)}, fleet.IdentityHardware, ""},
		{"when the clock is years ahead then hardware", setup{ca: vendor, edit: func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(-day), now.Add(day) },
			policy: at(now.Add(3650*day), floor)}, fleet.IdentityHardware, ""},
		{"when clock and floor are years ahead then unverified", setup{ca: vendor, edit: func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now.Add(-day), now.Add(day) },
			policy: at(now.Add(3650*day), now.Add(3650*day))}, fleet.IdentityUnverified, "before the time floor"},
	} {
		t.Run(c.when, func(t *testing.T) {
			ev := base
			ev.EKs = []pki.EndorsementKey{{Key: base.EKs[0].Key, Intermediates: c.intermediates}}
			if c.ca != nil {
				ev.EKs[0].Certificate = certify(t, c.ca, &s.ek.PublicKey, c.edit)
			}
			pol := pki.Policy{Now: now, TimeFloor: floor, VendorRoots: pool(vendor.Root, deep.Root), LabRoots: pool(lab.Root)}
			if c.policy != nil {
				c.policy(&pol)
			}
			v := verify(t, ev, pol)
			if v.Identity != c.want || v.EK != hash {
				t.Errorf("identity %v, want %v: %v", v.Identity, c.want, v.Findings)
			}
			if !strings.Contains(failed(v), c.why) {
				t.Errorf("findings %v, want one about %q", v.Findings, c.why)
			}
			if c.want < fleet.IdentityLab && len(v.Warnings) < 2 {
				t.Errorf("warnings %q", v.Warnings)
			}
		})
	}
}

// Certificates name places where more can be fetched: issuers, revocation
// lists, responders. A machine chooses its certificate, so that whoever went
// there could be sent anywhere inside the centre's network.
func TestNobodyGoesWhereAnEKCertificatePoints(t *testing.T) {
	trap, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer trap.Close()
	caught := make(chan net.Addr, 1)
	go func() {
		if c, err := trap.Accept(); err == nil {
			caught <- c.RemoteAddr()
			c.Close()
		}
	}()
	s, deep := newSoft(), newCA(t, true)
	ev := s.evidence(t, nil, nil)
	for _, url := range []string{"http://" + trap.Addr().String() + "/ca.cer", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "ldap://" + trap.Addr().String()} {
		// The issuer is missing: that is when a verifier would want to fetch it.
		ev.EKs = []pki.EndorsementKey{{Key: ev.EKs[0].Key, Certificate: certify(t, deep, &s.ek.PublicKey, func(c *x509.Certificate) {
			c.IssuingCertificateURL, c.OCSPServer, c.CRLDistributionPoints = []string{url}, []string{url}, []string{url}
		})}}
		if got := ev.EKs[0].Certificate.IssuingCertificateURL; len(got) != 1 {
			t.Fatalf("the certificate names %v: this test proves nothing", got)
		}
		if v := verify(t, ev, pki.Policy{Now: now, TimeFloor: floor, VendorRoots: pool(deep.Root)}); v.Identity != fleet.IdentityUnverified {
			t.Errorf("%s: identity %v", url, v.Identity)
		}
	}
	select {
	case from := <-caught:
		t.Errorf("somebody came from %s", from)
	default:
	}
}

func TestVerifyNamesOfTheTPM(t *testing.T) {
	s, ca := newSoft(), newCA(t, false)
	ev := s.evidence(t, nil, nil)
	ev.EKs[0].Certificate = certify(t, ca, &s.ek.PublicKey, func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, criticalSAN(t))
	})
	v := verify(t, ev, pki.Policy{VendorRoots: ca.Roots(), RootNames: map[[32]byte]string{sha256.Sum256(ca.Root.Raw): "infineon.pem"}})
	if v.TPMVendor != "IFX" || v.TPMModel != "SLB9670" || v.TPMFirmware != "0007" || v.EKRoot != "infineon.pem" {
		t.Errorf("names %q %q %q %q", v.TPMVendor, v.TPMModel, v.TPMFirmware, v.EKRoot)
	}
	// Nobody vouches: then the certificate's words are not repeated.
	v = verify(t, ev, pki.Policy{})
	if v.TPMVendor != "" || v.TPMModel != "" || v.EKRoot != "" {
		t.Errorf("an unknown authority's words: %q %q %q", v.TPMVendor, v.TPMModel, v.EKRoot)
	}
}

// TestVerifyOddNamesOfTheTPM: names are for display, so whatever a maker
// wrote must come out as something, or as nothing.
func TestVerifyOddNamesOfTheTPM(t *testing.T) {
	s, ca := newSoft(), newCA(t, false)
	good := criticalSAN(t).Value
	for _, c := range []struct {
		when  string
		value []byte
		want  string
	}{
		{"when all is well", good, "IFX"},
		{"when the vendor is no hex", bytes.Replace(good, []byte("id:49465800"), []byte("id:49xy5800"), 1), "49xy5800"},
		{"when the vendor is zero", bytes.Replace(good, []byte("id:49465800"), []byte("id:00000000"), 1), "00000000"},
		{"when the vendor is not text", bytes.Replace(good, []byte("id:49465800"), []byte("id:00001014"), 1), "00001014"},
		{"when the vendor moves the cursor", bytes.Replace(good, []byte("id:49465800"), []byte("id:\x1b[2J\x07\x00\xff\xfe"), 1), ".[2J...."},
		{"when it is empty", []byte{0x30, 0}, ""},
		{"when it holds a cut name", []byte{0x30, 4, 0xa4, 0x7f, 0x30, 0}, ""},
		{"when it holds a cut directory", []byte{0x30, 4, 0xa4, 2, 0x30, 0x7f}, ""},
		{"when it holds a cut set", []byte{0x30, 6, 0xa4, 4, 0x30, 2, 0x31, 0x7f}, ""},
		{"when it holds a cut attribute", []byte{0x30, 8, 0xa4, 6, 0x30, 4, 0x31, 2, 0x30, 0x7f}, ""},
		{"when it holds only a DNS name", []byte{0x30, 3, 0x82, 1, 'x'}, ""},
	} {
		t.Run(c.when, func(t *testing.T) {
			ev := s.evidence(t, nil, nil)
			der, err := ca.Certify(&s.ek.PublicKey, func(x *x509.Certificate) {
				x.ExtraExtensions = append(x.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: good})
			})
			if err != nil {
				t.Fatal(err)
			}
			cert, err := ekcert.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			for i := range cert.Extensions {
				if cert.Extensions[i].Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
					cert.Extensions[i].Value = c.value // x509 itself is strict about some
				}
			}
			ev.EKs[0].Certificate = cert
			v := verify(t, ev, pki.Policy{VendorRoots: ca.Roots()})
			if v.Identity != fleet.IdentityHardware || v.TPMVendor != c.want {
				t.Errorf("%v, vendor %q, want %q", v.Identity, v.TPMVendor, c.want)
			}
		})
	}
}

func TestVerifyHostileIssuerText(t *testing.T) {
	s := newSoft()
	key := softKey()
	bad := &x509.Certificate{SerialNumber: ca1, Subject: pkix.Name{CommonName: "\x1b[2J\u202eevil" + strings.Repeat("x", 1000)}, NotBefore: now, NotAfter: now.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: ca1, NotBefore: now, NotAfter: now.Add(time.Hour)}, bad, &s.ek.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	ev := s.evidence(t, nil, nil)
	if ev.EKs[0].Certificate, err = ekcert.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	v := verify(t, ev, pki.Policy{VendorRoots: newCA(t, false).Roots()})
	all := v.EKIssuer + failed(v) + strings.Join(v.Warnings, "")
	if strings.ContainsAny(all, "\x1b\u202e") || len(v.EKIssuer) > 1000 || !strings.Contains(v.EKIssuer, "evil") {
		t.Errorf("issuer text is %q", v.EKIssuer)
	}
}

var ca1 = big.NewInt(1)

func TestVerifyEKs(t *testing.T) {
	s, vendor := newSoft(), newCA(t, false)
	base := s.evidence(t, nil, nil)
	rsaEK := base.EKs[0].Key
	ecKey := func(curve elliptic.Curve, index uint32) pki.Key {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range tpm.EKKinds() {
			if kind.Certificate == index {
				p, err := k.PublicKey.Bytes()
				if err != nil {
					t.Fatal(err)
				}
				half := len(p) / 2
				pub := kind.Public
				pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
					X: tpm2.TPM2BECCParameter{Buffer: p[1 : 1+half]}, Y: tpm2.TPM2BECCParameter{Buffer: p[1+half:]},
				})
				return parsePublic(t, tpm2.Marshal(pub))
			}
		}
		t.Fatal("no such kind")
		return pki.Key{}
	}
	p256, p384 := ecKey(elliptic.P256(), 0x01C0000A), ecKey(elliptic.P384(), 0x01C00016)
	with := func(k pki.Key) pki.EndorsementKey {
		return pki.EndorsementKey{Key: k, Certificate: certify(t, vendor, k.Public, nil)}
	}
	bare := func(k pki.Key) pki.EndorsementKey { return pki.EndorsementKey{Key: k} }
	unread := func(k pki.Key) pki.EndorsementKey {
		return pki.EndorsementKey{Key: k, CertificateError: errTest("cannot be read")}
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		when string
		eks  []pki.EndorsementKey
		ok   bool
		want fleet.IdentityTrust
	}{
		{"RSA alone", []pki.EndorsementKey{with(rsaEK)}, true, fleet.IdentityHardware},
		{"P-384 alone", []pki.EndorsementKey{with(p384)}, true, fleet.IdentityHardware},
		{"all three in order", []pki.EndorsementKey{with(rsaEK), with(p256), with(p384)}, true, fleet.IdentityHardware},
		{"P-256 with certificate before RSA without", []pki.EndorsementKey{with(p256), bare(rsaEK)}, true, fleet.IdentityHardware},
		{"an unreadable certificate counts as one", []pki.EndorsementKey{unread(rsaEK), with(p384)}, true, fleet.IdentityUnverified},
		{"a certificate with an unreadable key", []pki.EndorsementKey{{Key: rsaEK, Certificate: &x509.Certificate{}}}, true, fleet.IdentityUnverified},
		{"P-384 before RSA", []pki.EndorsementKey{with(p384), with(rsaEK)}, false, 0},
		{"P-384 before P-256", []pki.EndorsementKey{with(p384), with(p256)}, false, 0},
		{"RSA without before P-256 with certificate", []pki.EndorsementKey{bare(rsaEK), with(p256)}, false, 0},
		{"P-256 before RSA, both without", []pki.EndorsementKey{bare(p256), bare(rsaEK)}, false, 0},
		{"a certificate for another EK", []pki.EndorsementKey{{Key: rsaEK, Certificate: certify(t, vendor, &stranger.PublicKey, nil)}}, false, 0},
		{"a certificate for another kind of EK", []pki.EndorsementKey{{Key: rsaEK, Certificate: certify(t, vendor, p256.Public, nil)}}, false, 0},
		{"an alias with a certificate for another EK", []pki.EndorsementKey{with(rsaEK), {Key: p256, Certificate: certify(t, vendor, p384.Public, nil)}}, false, 0},
	} {
		t.Run(c.when, func(t *testing.T) {
			ev := base
			ev.EKs = c.eks
			if !c.ok {
				refused(t, ev, "ek")
				return
			}
			v := verify(t, ev, pki.Policy{VendorRoots: vendor.Roots()})
			if v.Identity != c.want || len(v.Aliases) != len(c.eks)-1 {
				t.Errorf("identity %v, %d aliases: %v", v.Identity, len(v.Aliases), v.Findings)
			}
		})
	}
	t.Run("a good chain to a key that cannot be read is no trust", func(t *testing.T) {
		ev := base
		ek := with(rsaEK)
		ek.Certificate.PublicKey = nil
		ev.EKs = []pki.EndorsementKey{ek}
		if v := verify(t, ev, pki.Policy{VendorRoots: vendor.Roots()}); v.Identity != fleet.IdentityUnverified {
			t.Errorf("identity %v", v.Identity)
		}
	})
	t.Run("an alias on a list is a warning, not trust", func(t *testing.T) {
		ev := base
		ev.EKs = []pki.EndorsementKey{bare(rsaEK), bare(p384)}
		listed, err := fleet.HashEK(p384.Public)
		if err != nil {
			t.Fatal(err)
		}
		v := verify(t, ev, pki.Policy{Listed: func(h fleet.EKHash) bool { return h == listed }})
		if v.Identity != fleet.IdentityUnverified || !strings.Contains(strings.Join(v.Warnings, "\n"), listed.String()) {
			t.Errorf("identity %v, warnings %q", v.Identity, v.Warnings)
		}
	})
}

// TestForeignMaker: two makers, of which the centre knows one.
func TestForeignMaker(t *testing.T) {
	known, foreign := newMachine(t, swtpmtest.Options{Intermediate: true}), newMachine(t, swtpmtest.Options{})
	pol := pki.Policy{VendorRoots: known.swtpm.CA.Roots(), Intermediates: []*x509.Certificate{known.swtpm.CA.Issuer}}
	if v := verify(t, known.evidence(t), pol); v.Identity != fleet.IdentityHardware {
		t.Errorf("known maker: %v: %v", v.Identity, v.Findings)
	}
	if v := verify(t, foreign.evidence(t), pol); v.Identity != fleet.IdentityUnverified {
		t.Errorf("foreign maker: %v", v.Identity)
	}
	// The foreign machine shows the known one's certificate.
	ev := foreign.evidence(t)
	ev.EKs[0].Certificate = known.evidence(t).EKs[0].Certificate
	refused(t, ev, "ek")
}
