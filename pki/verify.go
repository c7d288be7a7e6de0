package pki

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"github.com/muster-edge/muster/fleet"
)

// Bounds of evidence. A PC has one to three EKs, vendors' chains two or three
// intermediates, firmware logs about 100 events.
const (
	maxEKs           = 8
	maxIntermediates = 8
	maxLogEvents     = 16384
)

// Verify judges evidence. The error is a *Refusal when one of the bindings
// that tie EK, AK, LDevID, statements, certificate request and transcript
// together does not hold; the verdict then holds the findings up to there
// and no trust. Everything else, a chain to nobody, no event log, a foreign
// program, is a lower trust and a finding, not an error: people decide.
//
// That the machine owns EKs[0] is proved by activating the credential made
// for it and the AK's name; the caller checks that before.
func Verify(ev Evidence, pol Policy) (Verdict, error) {
	v := &verifier{}
	if err := v.bindings(ev); err != nil {
		return Verdict{Findings: v.out.Findings}, err
	}
	v.identity(ev, pol)
	v.boot(ev, pol)
	return v.out, nil
}

// verifier collects a verdict.
type verifier struct{ out Verdict }

// bind notes a check whose failure is a refusal.
func (v *verifier) bind(check string, err error) error {
	if err == nil {
		v.find(check, true, "")
		return nil
	}
	v.find(check, false, err.Error())
	return &Refusal{Check: check, Detail: err.Error()}
}

func (v *verifier) find(check string, ok bool, detail string) {
	v.out.Findings = append(v.out.Findings, fleet.Finding{Check: check, OK: ok, Detail: detail})
}

func (v *verifier) warn(format string, args ...any) {
	v.out.Warnings = append(v.out.Warnings, fmt.Sprintf(format, args...))
}

// bindings walks the chain of proof from the EK to the certificate request.
// Each link names the key of the link before it; a link that is missing lets
// one machine speak for another.
func (v *verifier) bindings(ev Evidence) error {
	for _, step := range []struct {
		check string
		do    func() error
	}{
		{"ek", func() error { return checkEKs(ev.EKs, &v.out) }},
		{"ak-name", func() error { return checkName(ev.AK) }},
		{"ak", func() error { return checkSigningKey(ev.AK, AKAttributes) }},
		{"ldevid-name", func() error { return checkName(ev.LDevID) }},
		{"ldevid", func() error { return checkSigningKey(ev.LDevID, LDevIDAttributes) }},
		{"distinct-keys", func() error {
			if samePublic(ev.AK.Public, ev.LDevID.Public) {
				return fmt.Errorf("the attestation key and the LDevID are one key")
			}
			return nil
		}},
		{"certify", func() error { return checkHeader(ev.Certify, attestCertify, ev.AK.Name, ev.Transcript) }},
		{"certify-name", func() error { return checkCertified(ev.Certify, ev.LDevID.Name) }},
		{"certify-signature", func() error { return checkSignature(ev.Certify, ev.AK.Public.(*ecdsa.PublicKey)) }},
		{"quote", func() error { return checkHeader(ev.Quote, attestQuote, ev.AK.Name, ev.Transcript) }},
		{"quote-pcrs", func() error { return checkQuoted(ev.Quote, ev.PCRs) }},
		{"quote-signature", func() error { return checkSignature(ev.Quote, ev.AK.Public.(*ecdsa.PublicKey)) }},
		{"csr-key", func() error {
			if !samePublic(ev.CSRKey, ev.LDevID.Public) {
				return fmt.Errorf("the certificate request is for another key than the LDevID")
			}
			return nil
		}},
	} {
		if err := v.bind(step.check, step.do()); err != nil {
			return err
		}
	}
	return nil
}

// checkEKs checks form, certificates' keys and order of the EKs.
func checkEKs(eks []EndorsementKey, out *Verdict) error {
	if len(eks) == 0 || len(eks) > maxEKs {
		return fmt.Errorf("%d endorsement keys, want 1 to %d", len(eks), maxEKs)
	}
	seen := map[fleet.EKHash]bool{}
	var hashes []fleet.EKHash
	for i, ek := range eks {
		if err := checkEK(ek.Key); err != nil {
			return fmt.Errorf("EK %d: %w", i, err)
		}
		h, err := fleet.HashEK(ek.Key.Public)
		if err != nil {
			return fmt.Errorf("EK %d: %w", i, err)
		}
		if seen[h] {
			return fmt.Errorf("EK %d was shown before", i)
		}
		seen[h], hashes = true, append(hashes, h)
		if len(ek.Intermediates) > maxIntermediates {
			return fmt.Errorf("EK %d: %d intermediate certificates, want at most %d", i, len(ek.Intermediates), maxIntermediates)
		}
		// A certificate with a key that we cannot read proves nothing, and is
		// a finding later; one for another key is a lie.
		if ek.Certificate != nil && ek.Certificate.PublicKey != nil && !samePublic(ek.Certificate.PublicKey, ek.Key.Public) {
			return fmt.Errorf("EK %d: its certificate is for another key", i)
		}
	}
	// One TPM must always come as the same node: the identity EK is the first
	// with a certificate in the order of kinds; without any, RSA-2048 if shown.
	first, _ := ekRank(eks[0].Key)
	for i, ek := range eks[1:] {
		rank, _ := ekRank(ek.Key)
		switch {
		case hasCertificate(ek) && !hasCertificate(eks[0]):
			return fmt.Errorf("EK %d has a certificate and the first EK has none", i+1)
		case hasCertificate(ek) == hasCertificate(eks[0]) && rank < first:
			return fmt.Errorf("EK %d comes before the first EK in the order RSA-2048, P-256, P-384", i+1)
		}
	}
	out.EK, out.Aliases = hashes[0], hashes[1:]
	return nil
}

// hasCertificate counts certificates that we could not read: the order of
// EKs must not depend on which parser looked at them.
func hasCertificate(ek EndorsementKey) bool {
	return ek.Certificate != nil || ek.CertificateError != nil
}

// rootName is what people know a trust anchor by.
func rootName(root *x509.Certificate, pol Policy) string {
	if n, ok := pol.RootNames[sha256.Sum256(root.Raw)]; ok {
		return printable(n)
	}
	return printable(root.Subject.String())
}
