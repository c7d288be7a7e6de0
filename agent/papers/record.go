package papers

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// KeyRef is SHA-256 over the PKIX DER of a key: what Admissions name.
func KeyRef(public crypto.PublicKey) (ref Ref, err error) {
	id, err := statement.KeyID(public)
	if err != nil {
		return ref, fmt.Errorf("papers: name key: %w", err)
	}
	_, err = hex.Decode(ref[:], []byte(id))
	return ref, err
}

// recordEnvelope is a DSSE envelope that brings the public key of its one
// signature along. Admissions hold only the key's hash; readers that know the
// key already ignore the field. It needs no protection of its own: a key
// counts if its hash is the one that an admission names.
type recordEnvelope struct {
	PayloadType string            `json:"payloadType"`
	Payload     []byte            `json:"payload"`
	Signatures  []recordSignature `json:"signatures"`
}

type recordSignature struct {
	statement.Signature
	// Key is PKIX DER.
	Key []byte `json:"key,omitempty"`
}

// SignRecord makes the envelope of a cluster record, signed by this node's
// LDevID key. Learn takes it if the key's admission lets the node serve.
func SignRecord(signer crypto.Signer, tenant, site string, r clusterbootstrap.Record) ([]byte, error) {
	doc := fleet.ClusterRecord{Tenant: tenant, Site: site, UID: r.UID, Epoch: r.Epoch, Version: r.Version,
		Founder: r.Founder, Servers: r.Servers, Into: r.Into}
	if err := doc.Validate(); err != nil {
		return nil, fmt.Errorf("papers: sign record: %w", err)
	}
	payload, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("papers: sign record: %w", err)
	}
	e, err := statement.Sign(fleet.ClusterRecordPayload, payload, signer)
	if err != nil {
		return nil, fmt.Errorf("papers: sign record: %w", err)
	}
	key, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("papers: sign record: %w", err)
	}
	out, err := json.Marshal(recordEnvelope{PayloadType: e.PayloadType, Payload: e.Payload,
		Signatures: []recordSignature{{Signature: e.Signatures[0], Key: key}}})
	if err != nil {
		return nil, fmt.Errorf("papers: sign record: %w", err)
	}
	return out, nil
}

// maxKey is the longest key looked at: a P-256 key has 91 bytes.
const maxKey = 256

var errSigner = errors.New("no admitted server signed it")

// recordSigner returns the first key that signed the record and that may.
func recordSigner(envelope []byte, e statement.Envelope, may func(Ref) bool) (Ref, error) {
	var extra struct {
		Signatures []struct {
			Key []byte `json:"key"`
		} `json:"signatures"`
	}
	if err := json.Unmarshal(envelope, &extra); err != nil {
		return Ref{}, err
	}
	for _, s := range extra.Signatures {
		if len(s.Key) == 0 || len(s.Key) > maxKey {
			continue
		}
		key, err := x509.ParsePKIXPublicKey(s.Key)
		if err != nil {
			continue
		}
		ref, err := KeyRef(key)
		if err != nil || !may(ref) {
			continue
		}
		if _, err := e.VerifiedBy(fleet.ClusterRecordPayload, []crypto.PublicKey{key}); err == nil {
			return ref, nil
		}
	}
	return Ref{}, errSigner
}

func toRecord(r fleet.ClusterRecord) clusterbootstrap.Record {
	return clusterbootstrap.Record{UID: r.UID, Epoch: r.Epoch, Version: r.Version, Founder: r.Founder, Servers: r.Servers, Into: r.Into}
}

// greater orders two documents of one version as clusterbootstrap.Merge does:
// all peers must pick the same one.
func greater(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Compare(x, y) > 0
}
