package enroll

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
)

// NewEvidence keeps the stable part of verified evidence. The hardware
// description must have been cleaned (text.CleanHardware).
func NewEvidence(ev pki.Evidence, v pki.Verdict, hw fleet.Hardware) (fleet.Evidence, error) {
	key, err := KeyHash(ev.LDevID.Public)
	if err != nil {
		return fleet.Evidence{}, err
	}
	e := fleet.Evidence{
		EK: v.EK, Aliases: slices.Clone(v.Aliases),
		AKName: slices.Clone(ev.AK.Name), LDevIDName: slices.Clone(ev.LDevID.Name), LDevIDKey: key,
		Identity: v.Identity, Boot: v.Boot, Image: v.Image, EKIssuer: v.EKIssuer,
		PCRs:      map[int]fleet.HexBytes{},
		TPMVendor: v.TPMVendor, TPMFirmware: hw.TPMFirmware,
		Board:    strings.TrimSpace(hw.BoardVendor + " " + hw.Board),
		Serial:   hw.Serial,
		UUID:     strings.ToLower(hw.UUID),
		Hardware: hw,
	}
	// The certificate's vendor is proved, the machine's word is not; the
	// certificate's firmware version is the one of the day of making.
	if e.TPMVendor == "" {
		e.TPMVendor = hw.TPMVendor
	}
	if e.TPMFirmware == "" {
		e.TPMFirmware = v.TPMFirmware
	}
	for _, i := range EvidencePCRs {
		e.PCRs[i] = slices.Clone(ev.PCRs[i])
	}
	return e, nil
}

// KeyHash is SHA-256 over the PKIX DER of a P-256 key: how Admissions,
// tickets and evidence name an LDevID.
func KeyHash(public any) (fleet.HexBytes, error) {
	k, ok := public.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("enroll: hash LDevID key: want an ECDSA key, got %T", public)
	}
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return nil, fmt.Errorf("enroll: hash LDevID key: %w", err)
	}
	h := sha256.Sum256(der)
	return h[:], nil
}

// Diff says in plain words what is different in the stable evidence. It is
// empty exactly when both have the same EvidenceDigest.
func Diff(before, after fleet.Evidence) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	text := func(what, a, b string) {
		if a != b {
			say("%s was %s, is now %s", what, orNone(a), orNone(b))
		}
	}
	if before.EK != after.EK {
		say("It is another TPM: the EK was %s, is now %s", before.EK, after.EK)
	}
	owner := !slices.Equal(before.AKName, after.AKName)
	ldevid := !slices.Equal(before.LDevIDName, after.LDevIDName) || !slices.Equal(before.LDevIDKey, after.LDevIDKey)
	switch {
	case owner && ldevid:
		say("Attestation key and LDevID are new: the TPM was cleared (TPM2_Clear) or its keys were renewed")
	case owner:
		say("The attestation key is another one")
	case ldevid:
		say("The LDevID key is another one")
	}
	text("Identity", before.Identity.String(), after.Identity.String())
	text("Boot", before.Boot.String(), after.Boot.String())
	text("The image", before.Image, after.Image)
	for _, i := range EvidencePCRs {
		if !slices.Equal(before.PCRs[i], after.PCRs[i]) {
			say("%s", pcrChanged(i, before.PCRs[i], after.PCRs[i]))
		}
	}
	text("The TPM's vendor", before.TPMVendor, after.TPMVendor)
	text("The TPM's firmware", before.TPMFirmware, after.TPMFirmware)
	text("The board", before.Board, after.Board)
	text("The serial number", before.Serial, after.Serial)
	text("The system UUID", before.UUID, after.UUID)
	return out
}

var pcrMeaning = map[int]string{0: "firmware code", 2: "option ROMs", 7: "Secure Boot state"}

func orNone(s string) string {
	if s == "" {
		return "empty"
	}
	return `"` + s + `"`
}

func short(b fleet.HexBytes) string {
	switch {
	case len(b) == 0:
		return "none"
	case len(b) > 4:
		return b[:4].String() + "..."
	}
	return b.String()
}
