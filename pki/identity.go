package pki

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
)

var (
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidEKCertificate    = asn1.ObjectIdentifier{2, 23, 133, 8, 1} // tcg-kp-EKCertificate
	oidTPMManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidTPMModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidTPMVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	maxRSABits          = 4096
	maxDirectoryEntries = 16
)

// identity judges who vouches for the identity EK. It cannot refuse.
func (v *verifier) identity(ev Evidence, pol Policy) {
	ek := ev.EKs[0]
	switch {
	case ek.CertificateError != nil:
		v.find("ek-certificate", false, printable(ek.CertificateError.Error()))
		v.warn("The EK certificate cannot be read: %s", printable(ek.CertificateError.Error()))
	case ek.Certificate == nil:
		v.find("ek-certificate", false, "the TPM holds none")
		v.warn("The TPM has no EK certificate: its maker does not vouch for it.")
	default:
		v.certificate(ek, pol)
	}
	if pol.Listed == nil {
		return
	}
	if pol.Listed(v.out.EK) {
		v.find("ek-listed", true, "")
		v.raise(fleet.IdentityListed)
		return
	}
	v.find("ek-listed", false, "the EK is on no list")
	for _, alias := range v.out.Aliases {
		// Only the first EK's credential was activated. Anybody can show a
		// stranger's EK as an alias: EK certificates are public.
		if pol.Listed(alias) {
			v.warn("Another EK that this machine showed without proof (%s) is on a list.", alias)
		}
	}
}

func (v *verifier) raise(to fleet.IdentityTrust) {
	if v.out.Identity < to {
		v.out.Identity = to
	}
}

// certificate judges the identity EK's certificate.
func (v *verifier) certificate(ek EndorsementKey, pol Policy) {
	cert := ek.Certificate
	v.out.EKIssuer = printable(cert.Issuer.String())
	if err := checkEKCertificate(cert); err != nil {
		v.find("ek-certificate", false, err.Error())
		v.warn("The EK certificate is not one: %s.", err)
		return
	}
	v.find("ek-certificate", true, v.out.EKIssuer)
	var problems []string
	for _, anchor := range []struct {
		kind  string
		pool  *x509.CertPool
		trust fleet.IdentityTrust
	}{
		{"vendor", pol.VendorRoots, fleet.IdentityHardware},
		{"lab", pol.LabRoots, fleet.IdentityLab},
	} {
		if anchor.pool == nil {
			problems = append(problems, "there are no "+anchor.kind+" roots")
			continue
		}
		chain, err := verifyChain(ek, anchor.pool, pol)
		if err != nil {
			problems = append(problems, fmt.Sprintf("to no %s root: %s", anchor.kind, printable(err.Error())))
			continue
		}
		v.out.EKRoot = rootName(chain[len(chain)-1], pol)
		v.out.TPMVendor, v.out.TPMModel, v.out.TPMFirmware = tpmNames(cert)
		v.find("ek-chain", true, anchor.kind+" root "+v.out.EKRoot)
		v.raise(anchor.trust)
		return
	}
	v.find("ek-chain", false, strings.Join(problems, "; "))
	v.warn("The EK certificate chains to no root that we know (issuer %s).", v.out.EKIssuer)
}

// checkEKCertificate checks what is special about a certificate for an EK,
// TCG EK Credential Profile 2.x §3.2.
func checkEKCertificate(c *x509.Certificate) error {
	if c.PublicKey == nil {
		return errors.New("its public key cannot be read")
	}
	if c.IsCA {
		return errors.New("it is a CA certificate")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("its key may sign certificates")
	}
	// An empty list of usages is present, too (CVE-2026-40097 was about it).
	present := false
	for _, ext := range c.Extensions {
		present = present || ext.Id.Equal(oidExtKeyUsage)
	}
	if !present {
		return nil
	}
	for _, oid := range c.UnknownExtKeyUsage {
		if oid.Equal(oidEKCertificate) {
			return nil
		}
	}
	return errors.New("its extended key usage is not that of an EK")
}

// verifyChain verifies the EK certificate against one kind of roots.
//
// A certificate is rejected for its dates only if it had ended before the
// time floor: a centre whose clock went wrong must not lock machines out or
// let them in. x509.Verify judges a whole chain at one instant, so it is
// asked at several (now, and when each certificate of the machine began), and
// the chain it finds is then held against the floor.
func verifyChain(ek EndorsementKey, roots *x509.CertPool, pol Policy) ([]*x509.Certificate, error) {
	now := pol.Now
	if now.Before(pol.TimeFloor) {
		now = pol.TimeFloor
	}
	instants := []time.Time{now, ek.Certificate.NotBefore}
	intermediates := x509.NewCertPool()
	for _, c := range append(append([]*x509.Certificate(nil), ek.Intermediates...), pol.Intermediates...) {
		if c == nil || tooBig(c) {
			continue
		}
		intermediates.AddCert(c)
	}
	for _, c := range ek.Intermediates {
		if c != nil {
			instants = append(instants, c.NotBefore)
		}
	}
	leaf := *ek.Certificate
	// EK certificates name the TPM in a critical subjectAltName that Go cannot
	// read (golang/go#47618). We read it ourselves; any other critical
	// extension that nobody understands still fails.
	leaf.UnhandledCriticalExtensions = nil
	for _, oid := range ek.Certificate.UnhandledCriticalExtensions {
		if !oid.Equal(oidSubjectAltName) {
			leaf.UnhandledCriticalExtensions = append(leaf.UnhandledCriticalExtensions, oid)
		}
	}
	var why error
	for _, at := range instants {
		chains, err := leaf.Verify(x509.VerifyOptions{
			Roots:         roots,
			Intermediates: intermediates,
			CurrentTime:   at,
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		if err != nil {
			// That an instant was the wrong one to ask at tells least.
			if invalid := (x509.CertificateInvalidError{}); why == nil || errors.As(why, &invalid) && invalid.Reason == x509.Expired {
				why = err
			}
			continue
		}
		for _, chain := range chains {
			ended := endedBefore(chain, pol.TimeFloor)
			if ended == nil {
				return chain, nil
			}
			why = fmt.Errorf("certificate %q ended at %s, before the time floor", printable(ended.Subject.String()), ended.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil, why
}

func endedBefore(chain []*x509.Certificate, floor time.Time) *x509.Certificate {
	for _, c := range chain {
		if c.NotAfter.Before(floor) {
			return c
		}
	}
	return nil
}

// tooBig keeps machines from making the centre do arithmetic for minutes. The
// leaf's key is the EK's, whose kind is known by then.
func tooBig(c *x509.Certificate) bool {
	k, ok := c.PublicKey.(*rsa.PublicKey)
	return ok && (k.N == nil || k.N.BitLen() > maxRSABits)
}

// tpmNames reads maker, model and firmware version of the TPM from the
// certificate's subjectAltName (TCG EK Credential Profile §3.1.2): a
// directoryName with attributes of the form "id:49465800".
func tpmNames(c *x509.Certificate) (vendor, model, version string) {
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) != 0 {
			return "", "", ""
		}
		for der := names.Bytes; len(der) > 0; {
			var n asn1.RawValue
			rest, err := asn1.Unmarshal(der, &n)
			if err != nil {
				return "", "", ""
			}
			der = rest
			if n.Class == asn1.ClassContextSpecific && n.Tag == 4 {
				directoryNames(n.Bytes, func(oid asn1.ObjectIdentifier, value string) {
					switch {
					case oid.Equal(oidTPMManufacturer):
						vendor = vendorName(value)
					case oid.Equal(oidTPMModel):
						model = printable(value)
					case oid.Equal(oidTPMVersion):
						version = printable(strings.TrimPrefix(value, "id:"))
					}
				})
			}
		}
	}
	return vendor, model, version
}

// directoryNames calls f for each attribute of an RDNSequence. swtpm and some
// vendors put several attributes into one SET, others make a SET of each.
func directoryNames(der []byte, f func(asn1.ObjectIdentifier, string)) {
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	var sequence asn1.RawValue
	if _, err := asn1.Unmarshal(der, &sequence); err != nil {
		return
	}
	left := maxDirectoryEntries
	for sets := sequence.Bytes; len(sets) > 0 && left > 0; {
		var set asn1.RawValue
		rest, err := asn1.Unmarshal(sets, &set)
		if err != nil {
			return
		}
		sets = rest
		for in := set.Bytes; len(in) > 0 && left > 0; left-- {
			var a attribute
			if in, err = asn1.Unmarshal(in, &a); err != nil {
				return
			}
			f(a.Type, string(a.Value.Bytes))
		}
	}
}

// vendorName turns "id:49465800" into "IFX": four bytes of TCG vendor ID,
// ASCII padded with NUL or space. Other bytes stay hex.
func vendorName(s string) string {
	s = strings.TrimPrefix(s, "id:")
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 4 {
		return printable(s)
	}
	t := strings.TrimRight(string(b), "\x00 ")
	for _, r := range t {
		if r < '!' || r > '~' {
			return printable(s)
		}
	}
	if t == "" {
		return printable(s)
	}
	return t
}

// printable bounds text from a certificate: 200 characters, nothing that
// moves a cursor.
func printable(s string) string {
	const most = 200
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > most {
			return b.String() + "..."
		}
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = '.'
		}
		b.WriteRune(r)
	}
	return b.String()
}
