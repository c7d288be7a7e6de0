package tpm

import (
	"encoding/binary"
	"encoding/hex"

	"github.com/google/go-tpm/tpm2"
)

// Generation is the generation of AK and LDevID in use. Raising it gives
// every machine new keys, hence new evidence: that needs a decision.
const Generation uint32 = 0

// AKTemplate is the frozen template of the attestation key: a restricted
// P-256 ECDSA-SHA256 signing key. As a primary key in the owner hierarchy
// the template and the TPM's owner seed are all there is to the key: the same
// TPM makes the same key in every boot until TPM2_Clear.
//
// No byte of it may ever change, or every node becomes a stranger; a golden
// test holds it.
func AKTemplate(generation uint32) tpm2.TPMTPublic {
	t := signingTemplate("muster/ak/v1", generation)
	t.ObjectAttributes.Restricted = true
	return t
}

// LDevIDTemplate is the frozen template of the LDevID key, as AKTemplate but
// unrestricted: it signs what TLS asks it to.
func LDevIDTemplate(generation uint32) tpm2.TPMTPublic {
	return signingTemplate("muster/ldevid/v1", generation)
}

// signingTemplate puts the role into unique.x and the generation into
// unique.y: for primary keys, `unique` enters the derivation (TPM 2.0 Library
// Part 1 §27.2), so that roles and generations give unrelated keys.
func signingTemplate(role string, generation uint32) tpm2.TPMTPublic {
	x, y := make([]byte, 32), make([]byte, 32)
	copy(x, role)
	binary.BigEndian.PutUint32(y[28:], generation)
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:            true,
			FixedParent:         true,
			SensitiveDataOrigin: true,
			UserWithAuth:        true,
			NoDA:                true,
			SignEncrypt:         true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull},
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
			KDF:     tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: x},
			Y: tpm2.TPM2BECCParameter{Buffer: y},
		}),
	}
}

// EKKind is one of the EKs a TPM may have: where its certificate is and from
// which template it is made (TCG EK Credential Profile 2.5 §2.2.1, annex B).
type EKKind struct {
	// Label is for people: "RSA-2048".
	Label string
	// Certificate is the NV index of the certificate. Nonce and Template are
	// NV indices that, when there, change the template; 0 if the kind has none.
	Certificate, Nonce, Template uint32
	// Public is the template.
	Public tpm2.TPMTPublic
	// Rank is the place in the order that picks the identity EK.
	Rank int
}

// EKKinds lists the kinds of EK in the order that picks the identity EK:
// RSA-2048, P-256, P-384; the old template before the new one of each.
func EKKinds() []EKKind {
	return []EKKind{
		{Label: "RSA-2048", Certificate: 0x01C00002, Nonce: 0x01C00003, Template: 0x01C00004, Public: tpm2.RSAEKTemplate, Rank: 0},
		{Label: "RSA-2048 (H-1)", Certificate: 0x01C00012, Public: highEK(tpm2.TPMAlgRSA, tpm2.TPMAlgSHA256, 128, 0), Rank: 0},
		{Label: "P-256", Certificate: 0x01C0000A, Nonce: 0x01C0000B, Template: 0x01C0000C, Public: tpm2.ECCEKTemplate, Rank: 1},
		{Label: "P-256 (H-2)", Certificate: 0x01C00014, Public: highEK(tpm2.TPMAlgECC, tpm2.TPMAlgSHA256, 128, tpm2.TPMECCNistP256), Rank: 1},
		{Label: "P-384 (H-3)", Certificate: 0x01C00016, Public: highEK(tpm2.TPMAlgECC, tpm2.TPMAlgSHA384, 256, tpm2.TPMECCNistP384), Rank: 2},
	}
}

// Policies of EKs. PolicyA is PolicySecret(endorsement); PolicyB, of the high
// range, is PolicyOR(PolicyA, PolicyC) where PolicyC is a PolicyAuthorizeNV
// for the owner's use (TCG EK Credential Profile 2.5 annex B.6).
var (
	PolicyA256 = fromHex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
	PolicyC256 = fromHex("3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde")
	PolicyB256 = fromHex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0")
	PolicyA384 = fromHex("8bbf2266537c171cb56e403c4dc1d4b64f432611dc386e6f532050c3278c930e143e8bb1133824ccb431053871c6db53")
	PolicyC384 = fromHex("d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165")
	PolicyB384 = fromHex("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12")
)

// highEK is a template of the high range: empty unique, userWithAuth, PolicyB.
func highEK(kind, nameAlg tpm2.TPMAlgID, aes tpm2.TPMKeyBits, curve tpm2.TPMECCCurve) tpm2.TPMTPublic {
	t := tpm2.TPMTPublic{
		Type:    kind,
		NameAlg: nameAlg,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:            true,
			FixedParent:         true,
			SensitiveDataOrigin: true,
			UserWithAuth:        true,
			AdminWithPolicy:     true,
			Restricted:          true,
			Decrypt:             true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: PolicyB256},
	}
	if nameAlg == tpm2.TPMAlgSHA384 {
		t.AuthPolicy.Buffer = PolicyB384
	}
	symmetric := tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, aes),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
	if kind == tpm2.TPMAlgRSA {
		t.Parameters = tpm2.NewTPMUPublicParms(kind, &tpm2.TPMSRSAParms{Symmetric: symmetric, KeyBits: 2048})
		t.Unique = tpm2.NewTPMUPublicID(kind, &tpm2.TPM2BPublicKeyRSA{})
		return t
	}
	t.Parameters = tpm2.NewTPMUPublicParms(kind, &tpm2.TPMSECCParms{Symmetric: symmetric, CurveID: curve})
	t.Unique = tpm2.NewTPMUPublicID(kind, &tpm2.TPMSECCPoint{})
	return t
}

// fromHex is for constants of this file, which a test reads.
func fromHex(s string) []byte {
	b, _ := hex.DecodeString(s)
	return b
}
