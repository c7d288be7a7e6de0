package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// NodeProfile is all that a node certificate is made from. Nothing of a
// certificate request is in it but the key.
type NodeProfile struct {
	Tenant string
	// Site is "" for a node in the pool.
	Site string
	Node fleet.NodeID
	// Public is the LDevID key, *ecdsa.PublicKey on P-256.
	Public crypto.PublicKey
	Now    time.Time
}

// Names inside certificates. The domains end in the reserved name internal
// (ICANN, 2024), so that no public name can ever collide.
const (
	// TrustDomain is the parent of every tenant's SPIFFE trust domain.
	TrustDomain = "muster.internal"
	// NodeDomain is the parent of every node's DNS name, and the one to which
	// the node CA is constrained.
	NodeDomain = "node." + TrustDomain
)

// Lifetimes of certificates.
const (
	// NodeLifetime is how long a node certificate is good.
	NodeLifetime = 30 * 24 * time.Hour
	// ServerLifetime is how long a TLS server certificate is good.
	ServerLifetime = 90 * 24 * time.Hour
	// Backdate lets a verifier whose clock is slow take a new certificate.
	Backdate = 5 * time.Minute
)

// Validate reports all problems of the profile.
func (p NodeProfile) Validate() error {
	list := []error{fleet.ValidateName("tenant", p.Tenant), p.Node.Validate(), CheckKey(p.Public)}
	if p.Site != "" {
		list = append(list, fleet.ValidateName("site", p.Site))
	}
	if p.Now.IsZero() {
		list = append(list, errors.New("the time is not set"))
	}
	if err := errors.Join(list...); err != nil {
		return fmt.Errorf("pki: node profile: %w", err)
	}
	return nil
}

// CheckKey reports whether key is a valid point on P-256. Every other kind of
// key is refused: the LDevID template knows no other.
func CheckKey(key crypto.PublicKey) error {
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k == nil {
		return fmt.Errorf("key is %T, want ECDSA on P-256", key)
	}
	//lint:ignore SA1019 looking for missing coordinates, not computing with them
	if k.Curve != elliptic.P256() || k.X == nil || k.Y == nil {
		return errors.New("key is not on the curve P-256")
	}
	// ECDH refuses points that are not on the curve.
	if _, err := k.ECDH(); err != nil {
		return fmt.Errorf("key is not on the curve P-256: %w", err)
	}
	return nil
}

// DNSName is NODE.SITE.TENANT.node.muster.internal, with the site "pool" for
// a node without one.
func (p NodeProfile) DNSName() string {
	site := p.Site
	if site == "" {
		site = fleet.PoolSite
	}
	return string(p.Node) + "." + site + "." + p.Tenant + "." + NodeDomain
}

// URI is the node's SPIFFE ID. It has no site, so that it stays the same when
// the node moves.
func (p NodeProfile) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: p.Tenant + "." + TrustDomain, Path: "/node/" + string(p.Node)}
}

// LeafTemplate returns the certificate that the profile stands for, signed by
// issuer. All of it is set but the serial number. It refuses to date a
// certificate outside the issuer's own life: a clock that far off must not
// sign anything.
func LeafTemplate(p NodeProfile, issuer *x509.Certificate) (*x509.Certificate, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	notBefore, notAfter, err := Validity(p.Now, NodeLifetime, issuer)
	if err != nil {
		return nil, err
	}
	keyID, err := SubjectKeyID(p.Public)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		Subject:               pkix.Name{CommonName: string(p.Node)},
		Issuer:                issuer.Subject,
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		PublicKey:             p.Public,
		PublicKeyAlgorithm:    x509.ECDSA,
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		DNSNames:              []string{p.DNSName()},
		URIs:                  []*url.URL{p.URI()},
		SubjectKeyId:          keyID,
		AuthorityKeyId:        issuer.SubjectKeyId,
	}, nil
}

// Validity returns the dates of a certificate that issuer signs at now: in
// whole UTC seconds, backdated, and within the issuer's own dates.
func Validity(now time.Time, life time.Duration, issuer *x509.Certificate) (notBefore, notAfter time.Time, err error) {
	now = now.UTC().Truncate(time.Second)
	if now.Before(issuer.NotBefore) {
		return now, now, fmt.Errorf("pki: date certificate: the clock says %s, which is before the CA began (%s)",
			now.Format(time.RFC3339), issuer.NotBefore.Format(time.RFC3339))
	}
	if !now.Before(issuer.NotAfter) {
		return now, now, fmt.Errorf("pki: date certificate: the CA ended on %s", issuer.NotAfter.Format(time.RFC3339))
	}
	notBefore, notAfter = now.Add(-Backdate), now.Add(life)
	if notBefore.Before(issuer.NotBefore) {
		notBefore = issuer.NotBefore
	}
	if notAfter.After(issuer.NotAfter) {
		notAfter = issuer.NotAfter
	}
	return notBefore, notAfter, nil
}

// SubjectKeyID is the key identifier of RFC 7093 section 2, method 1: the
// first 20 bytes of SHA-256 over the bits of the subjectPublicKey.
func SubjectKeyID(key crypto.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("pki: key identifier: %w", err)
	}
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &spki); err != nil {
		return nil, fmt.Errorf("pki: key identifier: %w", err)
	}
	sum := sha256.Sum256(spki.Key.RightAlign())
	return sum[:20], nil
}

// Problem is one field of a certificate that is not as its profile wants it.
type Problem struct {
	Field, Got, Want string
}

// String returns a sentence for a person.
func (p Problem) String() string { return fmt.Sprintf("%s is %s, want %s", p.Field, p.Got, p.Want) }

// Object identifiers of the extensions in a leaf (RFC 5280 section 4.2.1),
// with their criticality.
var leafExtensions = map[string]bool{
	"2.5.29.14": false, // subject key identifier
	"2.5.29.15": true,  // key usage
	"2.5.29.17": false, // subject alternative name
	"2.5.29.19": true,  // basic constraints
	"2.5.29.35": false, // authority key identifier
	"2.5.29.37": false, // extended key usage
}

// CheckLeaf compares cert, field by field and extension by extension, with
// what LeafTemplate wants for the profile, and checks issuer's signature. An
// empty list means that the certificate says exactly what it should.
func CheckLeaf(cert, issuer *x509.Certificate, p NodeProfile) []Problem {
	want, err := LeafTemplate(p, issuer)
	if err != nil {
		return []Problem{{"profile", err.Error(), "a valid one"}}
	}
	var list []Problem
	same := func(field string, got, want any) {
		if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
			list = append(list, Problem{field, g, w})
		}
	}
	rawSubject, err := asn1.Marshal(want.Subject.ToRDNSequence())
	if err != nil {
		return []Problem{{"subject", err.Error(), "encodable"}}
	}
	same("version", cert.Version, 3)
	if s := cert.SerialNumber; s == nil || s.Sign() <= 0 || s.BitLen() > 159 || s.BitLen() < 64 {
		list = append(list, Problem{"serial number", fmt.Sprint(s), "a random positive number of 64 to 159 bits"})
	}
	same("subject", fmt.Sprintf("%x", cert.RawSubject), fmt.Sprintf("%x", rawSubject))
	same("issuer", fmt.Sprintf("%x", cert.RawIssuer), fmt.Sprintf("%x", issuer.RawSubject))
	same("not before", cert.NotBefore.UTC(), want.NotBefore)
	same("not after", cert.NotAfter.UTC(), want.NotAfter)
	if k, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !k.Equal(p.Public) {
		list = append(list, Problem{"public key", "another one", "the profile's"})
	}
	same("signature algorithm", cert.SignatureAlgorithm, want.SignatureAlgorithm)
	same("key usage", cert.KeyUsage, want.KeyUsage)
	same("extended key usage", cert.ExtKeyUsage, want.ExtKeyUsage)
	same("unknown extended key usage", cert.UnknownExtKeyUsage, []asn1.ObjectIdentifier(nil))
	same("basic constraints", cert.BasicConstraintsValid, true)
	same("CA", cert.IsCA, false)
	same("path length", cert.MaxPathLen, -1)
	same("DNS names", cert.DNSNames, want.DNSNames)
	same("URIs", cert.URIs, want.URIs)
	same("e-mail addresses", len(cert.EmailAddresses), 0)
	same("IP addresses", len(cert.IPAddresses), 0)
	same("policies", len(cert.Policies)+len(cert.PolicyIdentifiers), 0)
	same("CRL distribution points", len(cert.CRLDistributionPoints), 0)
	same("OCSP servers", len(cert.OCSPServer), 0)
	same("issuer URLs", len(cert.IssuingCertificateURL), 0)
	if !bytes.Equal(cert.SubjectKeyId, want.SubjectKeyId) {
		list = append(list, Problem{"subject key identifier", fmt.Sprintf("%x", cert.SubjectKeyId), fmt.Sprintf("%x", want.SubjectKeyId)})
	}
	if !bytes.Equal(cert.AuthorityKeyId, issuer.SubjectKeyId) {
		list = append(list, Problem{"authority key identifier", fmt.Sprintf("%x", cert.AuthorityKeyId), fmt.Sprintf("%x", issuer.SubjectKeyId)})
	}
	list = append(list, checkExtensions(cert)...)
	if err := cert.CheckSignatureFrom(issuer); err != nil {
		list = append(list, Problem{"signature", err.Error(), "one by the issuer"})
	}
	return list
}

// checkExtensions wants exactly the extensions of a leaf: what Go does not
// parse could mean something to another verifier. The subject alternative
// names are compared as bytes too, since Go skips the forms it does not know.
func checkExtensions(cert *x509.Certificate) []Problem {
	var list []Problem
	var seen []string
	for _, e := range cert.Extensions {
		id := e.Id.String()
		critical, known := leafExtensions[id]
		switch {
		case !known:
			list = append(list, Problem{"extension " + id, "present", "absent"})
		case slices.Contains(seen, id):
			list = append(list, Problem{"extension " + id, "present twice", "present once"})
		case critical != e.Critical:
			list = append(list, Problem{"criticality of extension " + id, fmt.Sprint(e.Critical), fmt.Sprint(critical)})
		}
		seen = append(seen, id)
		if id == "2.5.29.17" {
			var names []asn1.RawValue
			if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 || len(names) != 2 {
				list = append(list, Problem{"alternative names", fmt.Sprintf("%d", len(names)), "exactly one DNS name and one URI"})
			}
		}
	}
	for id := range leafExtensions {
		if !slices.Contains(seen, id) {
			list = append(list, Problem{"extension " + id, "absent", "present"})
		}
	}
	return list
}
