package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// checkSignature checks that ak signed the statement's bytes.
func checkSignature(s Statement, ak *ecdsa.PublicKey) error {
	sig := s.Signature
	if sig.Alg != AlgECDSA || sig.Hash != AlgSHA256 {
		return fmt.Errorf("want an ECDSA-SHA256 signature, got 0x%04x with 0x%04x", sig.Alg, sig.Hash)
	}
	if len(sig.R) > 32 || len(sig.S) > 32 {
		return errors.New("signature is longer than P-256 allows")
	}
	digest := sha256.Sum256(s.Raw)
	if !ecdsa.Verify(ak, digest[:], new(big.Int).SetBytes(sig.R), new(big.Int).SetBytes(sig.S)) {
		return errors.New("the signature is not the attestation key's")
	}
	return nil
}

// checkHeader checks what both kinds of statement share and that the signed
// bytes say what the fields say: they are written again from the fields and
// compared, so that nothing rests on the parser.
func checkHeader(s Statement, kind uint16, akName []byte, transcript [32]byte) error {
	if s.Magic != attestMagic {
		return fmt.Errorf("magic 0x%08x: not made by a TPM", s.Magic)
	}
	if s.Type != kind {
		return fmt.Errorf("statement of type 0x%04x, want 0x%04x", s.Type, kind)
	}
	if !bytes.Equal(s.ExtraData, transcript[:]) {
		return errors.New("it is about another transcript")
	}
	if !bytes.Equal(s.QualifiedSigner, OwnerQualifiedName(akName)) {
		return errors.New("the signer is not this attestation key as a primary key of the owner hierarchy")
	}
	if !bytes.Equal(s.Raw, s.encode()) {
		return errors.New("the signed bytes differ from what the fields say")
	}
	return nil
}

// encode writes the TPMS_ATTEST (TPM 2.0 Library Part 2 §10.12.12) that the
// fields describe, nil for fields that no statement of ours has. It writes
// three octets of PCR selection, what PC Client TPMs have.
func (s Statement) encode() []byte {
	b := binary.BigEndian.AppendUint32(nil, s.Magic)
	b = binary.BigEndian.AppendUint16(b, s.Type)
	b = appendSized(b, s.QualifiedSigner)
	b = appendSized(b, s.ExtraData)
	b = binary.BigEndian.AppendUint64(b, s.Clock.Clock)
	b = binary.BigEndian.AppendUint32(b, s.Clock.ResetCount)
	b = binary.BigEndian.AppendUint32(b, s.Clock.RestartCount)
	if s.Clock.Safe {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	b = binary.BigEndian.AppendUint64(b, s.FirmwareVersion)
	switch s.Type {
	case attestCertify:
		b = appendSized(b, s.Certified.Name)
		return appendSized(b, s.Certified.QualifiedName)
	case attestQuote:
		pcrs, ok := s.Quoted.PCRSelection[AlgSHA256]
		if !ok || len(s.Quoted.PCRSelection) != 1 {
			return nil
		}
		b = binary.BigEndian.AppendUint32(b, 1)
		b = binary.BigEndian.AppendUint16(b, AlgSHA256)
		var bits [3]byte
		for _, i := range pcrs {
			if i < 0 || i >= 24 {
				return nil
			}
			bits[i/8] |= 1 << (i % 8)
		}
		b = append(append(b, 3), bits[:]...)
		return appendSized(b, s.Quoted.PCRDigest)
	}
	return nil
}

// checkCertified checks that the statement certifies exactly this key.
func checkCertified(s Statement, name []byte) error {
	if !bytes.Equal(s.Certified.Name, name) {
		return errors.New("it certifies another key")
	}
	if !bytes.Equal(s.Certified.QualifiedName, OwnerQualifiedName(name)) {
		return errors.New("the certified key is not a primary key of the owner hierarchy")
	}
	return nil
}

// checkQuoted checks that exactly the wanted PCRs of exactly the SHA-256 bank
// were quoted and that values are what was quoted. A quote over no PCRs is
// well signed too (CVE-2022-0317): the set is compared first.
func checkQuoted(s Statement, values map[int][]byte) error {
	for bank := range s.Quoted.PCRSelection {
		if bank != AlgSHA256 {
			return fmt.Errorf("it quotes PCR bank 0x%04x, want only SHA-256", bank)
		}
	}
	got := s.Quoted.PCRSelection[AlgSHA256]
	if !slices.Equal(got, QuotePCRs) {
		return fmt.Errorf("it quotes PCRs %v, want %v", got, QuotePCRs)
	}
	h := sha256.New()
	for _, i := range QuotePCRs {
		v, ok := values[i]
		if !ok || len(v) != sha256.Size {
			return fmt.Errorf("PCR %d has no SHA-256 value", i)
		}
		h.Write(v)
	}
	if len(values) != len(QuotePCRs) {
		return fmt.Errorf("%d PCR values for %d PCRs", len(values), len(QuotePCRs))
	}
	if !bytes.Equal(h.Sum(nil), s.Quoted.PCRDigest) {
		return errors.New("the values are not those that were quoted")
	}
	return nil
}
