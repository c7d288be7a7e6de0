package tpm

import (
	"errors"
	"fmt"
	"io"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki"
)

// MaxSecret is the longest secret that fits every EK's credential, in bytes:
// the digest size of SHA-256.
const MaxSecret = 32

// MakeCredential encrypts secret to an EK such that only the TPM of that EK
// decrypts it, and only while it holds a key with the name akName (TPM 2.0
// Library Part 1 §24). It returns a TPM2B_ID_OBJECT and a
// TPM2B_ENCRYPTED_SECRET as TPM2_ActivateCredential takes them. EKs are
// RSA-2048 and P-256 (with SHA-256, AES-128) and P-384 (SHA-384, AES-256).
func MakeCredential(rand io.Reader, ek pki.Key, akName, secret []byte) (credentialBlob, encryptedSecret []byte, err error) {
	defer func() {
		if err != nil {
			credentialBlob, encryptedSecret, err = nil, nil, fmt.Errorf("tpm: make credential: %w", err)
		}
	}()
	defer guard(&err)
	if len(secret) == 0 || len(secret) > MaxSecret {
		return nil, nil, fmt.Errorf("secret of %d bytes, want 1 to %d", len(secret), MaxSecret)
	}
	if len(akName) < 2+32 || len(akName) > maxName {
		return nil, nil, fmt.Errorf("name of %d bytes", len(akName))
	}
	pub, err := decode[tpm2.TPMTPublic](ek.Raw, maxPublic)
	if err != nil {
		return nil, nil, err
	}
	if _, err := ParsePublic(ek.Raw); err != nil {
		return nil, nil, err
	}
	if err := checkStorage(pub); err != nil {
		return nil, nil, err
	}
	key, err := tpm2.ImportEncapsulationKey(pub)
	if err != nil {
		return nil, nil, err
	}
	blob, enc, err := tpm2.CreateCredential(rand, key, akName, secret)
	if err != nil {
		return nil, nil, err
	}
	return sized(blob), sized(enc), nil
}

// checkStorage checks that the key is a restricted decryption key with the
// protections we know how to make, before go-tpm looks at its unions.
func checkStorage(pub *tpm2.TPMTPublic) error {
	if !pub.ObjectAttributes.Restricted || !pub.ObjectAttributes.Decrypt || pub.ObjectAttributes.SignEncrypt {
		return errors.New("the key is not a storage key")
	}
	var sym *tpm2.TPMTSymDefObject
	var scheme tpm2.TPMAlgID
	switch pub.Type {
	case tpm2.TPMAlgRSA:
		p, err := pub.Parameters.RSADetail()
		if err != nil {
			return err
		}
		sym, scheme = &p.Symmetric, p.Scheme.Scheme
	case tpm2.TPMAlgECC:
		p, err := pub.Parameters.ECCDetail()
		if err != nil {
			return err
		}
		sym, scheme = &p.Symmetric, p.Scheme.Scheme
	default:
		return errors.New("the key is neither RSA nor ECC")
	}
	if scheme != tpm2.TPMAlgNull {
		return errors.New("a storage key has no scheme")
	}
	if sym.Algorithm != tpm2.TPMAlgAES {
		return errors.New("the key does not protect with AES")
	}
	mode, err := sym.Mode.AES()
	if err != nil || *mode != tpm2.TPMAlgCFB {
		return errors.New("the key does not protect with AES-CFB")
	}
	bits, err := sym.KeyBits.AES()
	if err != nil || (*bits != 128 && *bits != 192 && *bits != 256) {
		return errors.New("the key does not protect with AES of 128, 192 or 256 bits")
	}
	return nil
}
