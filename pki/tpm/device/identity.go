package device

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki/tpm"
)

// EKBlob is one EK as the TPM gave it.
type EKBlob struct {
	// Public is a TPMT_PUBLIC.
	Public []byte
	// Certificate is the content of the NV index, nil without one. It may
	// have a header and padding.
	Certificate []byte
	// Chain are intermediate certificates, DER.
	Chain [][]byte
}

// Identity is what a machine shows of its TPM at the start of an enrollment.
type Identity struct {
	// EKs: the identity EK first. See DESIGN.md of pki for the order.
	EKs []EKBlob
	// AKPublic and LDevIDPublic are TPMT_PUBLICs.
	AKPublic, LDevIDPublic []byte
	// Problems are sentences about what was left out, for the log.
	Problems []string
}

// ekSource says how to get at an EK again: a persistent handle, or a
// template to make it from.
type ekSource struct {
	persistent tpm2.TPMHandle // 0 if there is none
	template   tpm2.TPMTPublic
	raw        []byte
}

// maxPersistent bounds how many persistent keys are looked at.
const maxPersistent = 16

// Identity collects the EKs with their certificates and makes AK and LDevID.
// The first call takes a second or more on real TPMs.
func (d *Device) Identity(ctx context.Context) (Identity, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var id Identity
	err := d.retry(func() error {
		id = Identity{}
		if err := d.collectEKs(ctx, &id); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		ak, err := d.loadAK()
		if err != nil {
			return err
		}
		ldevid, err := d.loadLDevID()
		if err != nil {
			return err
		}
		id.AKPublic, id.LDevIDPublic = bytes.Clone(ak.raw), bytes.Clone(ldevid.raw)
		return nil
	})
	if err != nil {
		return Identity{}, fmt.Errorf("tpm/device: read identity: %w", err)
	}
	return id, nil
}

// collectEKs finds the EKs that have a certificate, and without any the
// RSA-2048 EK. The identity EK must come out the same in every boot, so
// nothing here depends on what happens to be persisted, but time.
func (d *Device) collectEKs(ctx context.Context, id *Identity) error {
	present, err := d.nvIndices()
	if err != nil {
		return err
	}
	persistent, err := d.persistentKeys()
	if err != nil {
		return err
	}
	chain, err := d.readChain(present)
	if err != nil {
		id.Problems = append(id.Problems, err.Error())
	}
	d.identity = nil
	seen := map[string]bool{}
	add := func(kind tpm.EKKind, certificate []byte) error {
		src, err := d.endorsementKey(kind, present, persistent, certificate)
		if err != nil {
			return err
		}
		if seen[string(src.raw)] {
			return nil
		}
		seen[string(src.raw)] = true
		blob := EKBlob{Public: src.raw, Certificate: certificate}
		if certificate != nil {
			blob.Chain = chain
		}
		id.EKs = append(id.EKs, blob)
		if d.identity == nil {
			d.identity = src
		}
		return nil
	}
	for _, kind := range tpm.EKKinds() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !present[kind.Certificate] {
			continue
		}
		certificate, err := d.nvRead(kind.Certificate)
		if err == nil {
			err = add(kind, certificate)
		}
		if permanent(err) {
			id.Problems = append(id.Problems, fmt.Sprintf("EK %s: %v", kind.Label, err))
		} else if err != nil {
			return fmt.Errorf("EK %s: %w", kind.Label, err)
		}
	}
	if len(id.EKs) > 0 {
		return nil
	}
	var problems error
	for _, kind := range tpm.EKKinds() {
		err := add(kind, nil)
		if err == nil {
			return nil
		}
		if !permanent(err) {
			return fmt.Errorf("EK %s: %w", kind.Label, err)
		}
		problems = errors.Join(problems, fmt.Errorf("EK %s: %w", kind.Label, err))
	}
	return problems
}

// errUnusable marks what will be wrong in every boot.
var errUnusable = errors.New("not usable")

// permanent tells an EK that this TPM will never give from one that it did
// not give this time. After a passing fault the machine must try again: with
// the next EK it would be another node.
func permanent(err error) bool {
	if errors.Is(err, errUnusable) {
		return true
	}
	// Format one about a parameter: the TPM does not know such keys (TPM 2.0
	// Library Part 2 §6.6.2).
	var rc tpm2.TPMRC
	return errors.As(err, &rc) && rc&0x80 != 0 && rc&0x40 != 0
}

// persistentKey is a key that somebody made persistent.
type persistentKey struct {
	handle tpm2.TPMHandle
	raw    []byte
	public tpm2.TPMTPublic
}

// persistentKeys reads the persistent keys of the EK range, TCG PC Client
// Platform TPM Profile §: 0x81010000-0x810100FF.
func (d *Device) persistentKeys() ([]persistentKey, error) {
	handles, err := d.handles(0x81010000, maxPersistent)
	if err != nil {
		return nil, err
	}
	var out []persistentKey
	for _, h := range handles {
		if h < 0x81010000 || h > 0x810100FF {
			continue
		}
		rsp, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(d.tpm)
		if err != nil {
			continue
		}
		raw := rsp.OutPublic.Bytes()
		if _, err := tpm.ParsePublic(raw); err != nil {
			continue
		}
		pub, err := rsp.OutPublic.Contents()
		if err != nil {
			continue
		}
		out = append(out, persistentKey{handle: h, raw: bytes.Clone(raw), public: *pub})
	}
	return out, nil
}

// endorsementKey returns the EK of a kind. A persistent key is used only if
// its public area is the template's in all but the key itself and, with a
// certificate, the certificate speaks of it; whatever else lies at the usual
// handle is somebody's key, not the EK. Else the EK is made from the
// template, which is slow for RSA.
func (d *Device) endorsementKey(kind tpm.EKKind, present map[uint32]bool, persistent []persistentKey, certificate []byte) (*ekSource, error) {
	template, err := d.ekTemplate(kind, present)
	if err != nil {
		return nil, err
	}
	for _, p := range persistent {
		if certificate != nil && sameTemplate(p.public, template) && mentions(certificate, p.raw) {
			return &ekSource{persistent: p.handle, template: template, raw: p.raw}, nil
		}
	}
	k, err := d.create(tpm2.TPMRHEndorsement, template)
	if err != nil {
		return nil, err
	}
	d.flush(k)
	if certificate != nil && !mentions(certificate, k.raw) {
		return nil, fmt.Errorf("%w: the certificate in NV is for another key", errUnusable)
	}
	return &ekSource{template: template, raw: k.raw}, nil
}

// ekTemplate is the kind's template as this TPM's maker changed it: by a
// template of its own, or a nonce in `unique` (TCG EK Credential Profile
// §2.2.1.5).
func (d *Device) ekTemplate(kind tpm.EKKind, present map[uint32]bool) (tpm2.TPMTPublic, error) {
	if kind.Template != 0 && present[kind.Template] {
		b, err := d.nvRead(kind.Template)
		if err != nil {
			return kind.Public, err
		}
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
		if err != nil {
			return kind.Public, fmt.Errorf("%w: template in NV: %w", errUnusable, err)
		}
		return *pub, nil
	}
	if kind.Nonce == 0 || !present[kind.Nonce] {
		return kind.Public, nil
	}
	nonce, err := d.nvRead(kind.Nonce)
	if err != nil {
		return kind.Public, err
	}
	return withNonce(kind.Public, nonce)
}

func withNonce(t tpm2.TPMTPublic, nonce []byte) (tpm2.TPMTPublic, error) {
	switch t.Type {
	case tpm2.TPMAlgRSA:
		if len(nonce) > 256 {
			return t, fmt.Errorf("%w: EK nonce of %d bytes", errUnusable, len(nonce))
		}
		buf := make([]byte, 256)
		copy(buf, nonce)
		t.Unique = tpm2.NewTPMUPublicID(t.Type, &tpm2.TPM2BPublicKeyRSA{Buffer: buf})
	case tpm2.TPMAlgECC:
		if len(nonce) > 32 {
			return t, fmt.Errorf("%w: EK nonce of %d bytes", errUnusable, len(nonce))
		}
		x := make([]byte, 32)
		copy(x, nonce)
		t.Unique = tpm2.NewTPMUPublicID(t.Type, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: x},
			Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		})
	}
	return t, nil
}

// sameTemplate compares two public areas without their keys.
func sameTemplate(a, b tpm2.TPMTPublic) bool {
	if a.Type != b.Type {
		return false
	}
	a.Unique, b.Unique = emptyUnique(a.Type), emptyUnique(b.Type)
	return bytes.Equal(tpm2.Marshal(a), tpm2.Marshal(b))
}

func emptyUnique(kind tpm2.TPMAlgID) tpm2.TPMUPublicID {
	if kind == tpm2.TPMAlgRSA {
		return tpm2.NewTPMUPublicID(kind, &tpm2.TPM2BPublicKeyRSA{})
	}
	return tpm2.NewTPMUPublicID(kind, &tpm2.TPMSECCPoint{})
}

// mentions tells whether a certificate contains a key's modulus or point. It
// only helps to choose among this TPM's own keys; the centre compares
// properly.
func mentions(certificate, raw []byte) bool {
	key, err := tpm.ParsePublic(raw)
	if err != nil {
		return false
	}
	switch pub := key.Public.(type) {
	case *rsa.PublicKey:
		return bytes.Contains(certificate, pub.N.Bytes())
	case *ecdsa.PublicKey:
		point, err := pub.Bytes()
		return err == nil && bytes.Contains(certificate, point)
	}
	return false
}

// withEK runs f with the identity EK at hand, and gives its slot back.
func (d *Device) withEK(f func(ek *loaded, pub tpm2.TPMTPublic) error) error {
	src := d.identity
	if src == nil {
		return errors.New("the identity was not read before")
	}
	var ek *loaded
	if src.persistent != 0 {
		rsp, err := tpm2.ReadPublic{ObjectHandle: src.persistent}.Execute(d.tpm)
		if err != nil {
			return fmt.Errorf("read EK: %w", explain(err))
		}
		if !bytes.Equal(rsp.OutPublic.Bytes(), src.raw) {
			return errors.New("the persistent EK was replaced")
		}
		ek = &loaded{handle: src.persistent, name: rsp.Name, raw: src.raw}
	} else {
		k, err := d.create(tpm2.TPMRHEndorsement, src.template)
		if err != nil {
			return fmt.Errorf("make EK: %w", err)
		}
		defer d.flush(k)
		if !bytes.Equal(k.raw, src.raw) {
			return errors.New("the EK has changed")
		}
		ek = k
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](src.raw)
	if err != nil {
		return err
	}
	return f(ek, *pub)
}
