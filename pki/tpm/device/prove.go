package device

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
)

// maxCredential bounds a TPM2B_ID_OBJECT and a TPM2B_ENCRYPTED_SECRET.
const maxCredential = 1024

// ActivateCredential decrypts a credential that was made for this TPM's
// identity EK and AK. credentialBlob is a TPM2B_ID_OBJECT, encryptedSecret a
// TPM2B_ENCRYPTED_SECRET. Identity must have been called.
//
// The secret comes back through a session salted with the EK, so that the
// bus between TPM and processor does not carry it in clear.
func (d *Device) ActivateCredential(credentialBlob, encryptedSecret []byte) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var secret []byte
	blob, err := tpm.SplitSized(credentialBlob, maxCredential)
	if err != nil {
		return nil, fmt.Errorf("tpm/device: activate credential: %w", err)
	}
	enc, err := tpm.SplitSized(encryptedSecret, maxCredential)
	if err != nil {
		return nil, fmt.Errorf("tpm/device: activate credential: %w", err)
	}
	err = d.retry(func() error {
		return d.withEK(func(ek *loaded, ekPub tpm2.TPMTPublic) error {
			ak, err := d.loadAK()
			if err != nil {
				return err
			}
			protected := tpm2.HMAC(tpm2.TPMAlgSHA256, 16,
				tpm2.Salted(ek.handle, ekPub), tpm2.AESEncryption(128, tpm2.EncryptOut))
			rsp, err := tpm2.ActivateCredential{
				ActivateHandle: tpm2.AuthHandle{Handle: ak.handle, Name: ak.name, Auth: protected},
				KeyHandle:      tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: ekSession(ekPub)},
				CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob},
				Secret:         tpm2.TPM2BEncryptedSecret{Buffer: enc},
			}.Execute(d.tpm)
			if err != nil {
				return err
			}
			secret = rsp.CertInfo.Buffer
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("tpm/device: activate credential: %w", err)
	}
	return secret, nil
}

// ekSession is a policy session that satisfies the EK's policy; it holds for
// one command.
func ekSession(ek tpm2.TPMTPublic) tpm2.Session {
	return tpm2.Policy(ek.NameAlg, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			PolicySession: session,
			NonceTPM:      nonce,
		}.Execute(t)
		if err != nil {
			return explain(err)
		}
		var branches []tpm2.TPM2BDigest
		switch {
		case bytes.Equal(ek.AuthPolicy.Buffer, tpm.PolicyB256):
			branches = []tpm2.TPM2BDigest{{Buffer: tpm.PolicyA256}, {Buffer: tpm.PolicyC256}}
		case bytes.Equal(ek.AuthPolicy.Buffer, tpm.PolicyB384):
			branches = []tpm2.TPM2BDigest{{Buffer: tpm.PolicyA384}, {Buffer: tpm.PolicyC384}}
		default:
			return nil
		}
		_, err = tpm2.PolicyOr{PolicySession: session, PHashList: tpm2.TPMLDigest{Digests: branches}}.Execute(t)
		return err
	})
}

// Certify lets the AK state which key the LDevID is. It returns a
// TPMS_ATTEST and a TPMT_SIGNATURE.
func (d *Device) Certify(qualifying [32]byte) (attest, sig []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err = d.retry(func() error {
		ak, err := d.loadAK()
		if err != nil {
			return err
		}
		ldevid, err := d.loadLDevID()
		if err != nil {
			return err
		}
		rsp, err := tpm2.Certify{
			ObjectHandle:   ldevid.auth(),
			SignHandle:     ak.auth(),
			QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		}.Execute(d.tpm)
		if err != nil {
			return err
		}
		attest, sig = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
		s, err := tpm.ParseCertify(attest, sig)
		if err != nil {
			return err
		}
		if !bytes.Equal(s.Certified.Name, ldevid.name.Buffer) || !signed(ak.public, s) {
			return errWrongKey
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("tpm/device: certify LDevID: %w", err)
	}
	return attest, sig, nil
}

// Quote lets the AK state the values of PCRs in the SHA-256 bank. It returns
// a TPMS_ATTEST, a TPMT_SIGNATURE and the values.
func (d *Device) Quote(qualifying [32]byte, pcrs []int) (attest, sig []byte, values map[int][]byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	selection, err := selectPCRs(pcrs)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("tpm/device: quote: %w", err)
	}
	err = d.retry(func() error {
		// A PCR may be extended between the quote and the reading of values.
		for range 3 {
			ak, err := d.loadAK()
			if err != nil {
				return err
			}
			rsp, err := tpm2.Quote{
				SignHandle:     ak.auth(),
				QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
				InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				PCRSelect:      selection,
			}.Execute(d.tpm)
			if err != nil {
				return err
			}
			attest, sig = rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature)
			s, err := tpm.ParseQuote(attest, sig)
			if err != nil {
				return err
			}
			if !signed(ak.public, s) {
				return errWrongKey
			}
			if values, err = d.readPCRs(pcrs); err != nil {
				return err
			}
			if bytes.Equal(digestOf(values), s.Quoted.PCRDigest) {
				return nil
			}
		}
		return errors.New("the PCRs keep changing")
	})
	if err != nil {
		return nil, nil, nil, fmt.Errorf("tpm/device: quote: %w", err)
	}
	return attest, sig, values, nil
}

// selectPCRs makes a selection of the SHA-256 bank.
func selectPCRs(pcrs []int) (tpm2.TPMLPCRSelection, error) {
	if len(pcrs) == 0 {
		return tpm2.TPMLPCRSelection{}, errors.New("no PCRs")
	}
	bits := make([]byte, 3)
	for _, i := range pcrs {
		if i < 0 || i > 23 {
			return tpm2.TPMLPCRSelection{}, fmt.Errorf("no PCR %d", i)
		}
		bits[i/8] |= 1 << (i % 8)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bits}}}, nil
}

// readPCRs reads values; the TPM gives at most eight per command and says
// which it gave.
func (d *Device) readPCRs(pcrs []int) (map[int][]byte, error) {
	values := map[int][]byte{}
	left := slices.Clone(pcrs)
	for len(left) > 0 {
		selection, err := selectPCRs(left)
		if err != nil {
			return nil, err
		}
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection}.Execute(d.tpm)
		if err != nil {
			return nil, err
		}
		var got []int
		for _, s := range rsp.PCRSelectionOut.PCRSelections {
			for i := range len(s.PCRSelect) * 8 {
				if s.PCRSelect[i/8]&(1<<(i%8)) != 0 {
					got = append(got, i)
				}
			}
		}
		if len(got) == 0 || len(got) != len(rsp.PCRValues.Digests) {
			return nil, errors.New("the TPM has no SHA-256 PCR bank")
		}
		for n, i := range got {
			if !slices.Contains(left, i) || len(rsp.PCRValues.Digests[n].Buffer) != sha256.Size {
				return nil, errors.New("the TPM answered with other PCRs")
			}
			values[i] = rsp.PCRValues.Digests[n].Buffer
		}
		left = slices.DeleteFunc(left, func(i int) bool { _, ok := values[i]; return ok })
	}
	return values, nil
}

// digestOf is the digest that a quote states: over the values in ascending
// order of the PCRs.
func digestOf(values map[int][]byte) []byte {
	h := sha256.New()
	for i := range 24 {
		h.Write(values[i])
	}
	return h.Sum(nil)
}

// signed tells whether a statement is signed by the key we think.
func signed(key *ecdsa.PublicKey, s pki.Statement) bool {
	digest := sha256.Sum256(s.Raw)
	return key != nil && ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(s.Signature.R), new(big.Int).SetBytes(s.Signature.S))
}

// signer is the LDevID key as a crypto.Signer.
type signer struct{ d *Device }

// Public returns the *ecdsa.PublicKey, nil if the TPM does not give it.
func (s *signer) Public() crypto.PublicKey {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	var key *loaded
	err := s.d.retry(func() (err error) {
		key, err = s.d.loadLDevID()
		return err
	})
	if err != nil || key.public == nil {
		return nil
	}
	return key.public
}

// Sign signs a SHA-256 digest. The random source is not used: the TPM has its
// own.
func (s *signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("tpm/device: sign: the LDevID key signs SHA-256 digests only")
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	var out []byte
	err := s.d.retry(func() error {
		key, err := s.d.loadLDevID()
		if err != nil {
			return err
		}
		rsp, err := tpm2.Sign{
			KeyHandle: key.auth(),
			Digest:    tpm2.TPM2BDigest{Buffer: digest},
			InScheme:  tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Validation: tpm2.TPMTTKHashCheck{
				Tag:       tpm2.TPMSTHashCheck,
				Hierarchy: tpm2.TPMRHNull,
			},
		}.Execute(s.d.tpm)
		if err != nil {
			return err
		}
		sig, err := rsp.Signature.Signature.ECDSA()
		if err != nil {
			return err
		}
		if out, err = asn1.Marshal(struct{ R, S *big.Int }{
			new(big.Int).SetBytes(sig.SignatureR.Buffer), new(big.Int).SetBytes(sig.SignatureS.Buffer),
		}); err != nil {
			return err
		}
		if !ecdsa.VerifyASN1(key.public, digest, out) {
			return errWrongKey
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("tpm/device: sign: %w", err)
	}
	return out, nil
}
