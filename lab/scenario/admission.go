package scenario

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// readOrdersKey reads the public orders key that the image trusts.
func readOrdersKey(path string) (any, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s holds no public key", path)
	}
	return x509.ParsePKIXPublicKey(block.Bytes)
}

// checkAdmission checks the documents that a node got with its certificate:
// one admission that names the node, its site and the key in its TPM, and, at
// most, the charter of its site; all signed by the tenant's orders key. It reads envelope and payload with the standard
// library and spells their format out, so that it cannot repeat the mistakes
// of the code that made them.
func checkAdmission(documents [][]byte, key any, r fleet.Request, now time.Time) error {
	const admission, charter = "application/vnd.muster.admission.v1+json", "application/vnd.muster.charter.v1+json"
	byKind := map[string][][]byte{}
	for _, d := range documents {
		var e struct {
			PayloadType string `json:"payloadType"`
		}
		if err := json.Unmarshal(d, &e); err != nil {
			return fmt.Errorf("document: %w", err)
		}
		if e.PayloadType != admission && e.PayloadType != charter {
			return fmt.Errorf("a document of type %q", e.PayloadType)
		}
		byKind[e.PayloadType] = append(byKind[e.PayloadType], d)
	}
	if len(byKind[admission]) != 1 || len(byKind[charter]) > 1 {
		return fmt.Errorf("%d admissions and %d charters, want one and at most one", len(byKind[admission]), len(byKind[charter]))
	}
	for _, d := range byKind[charter] {
		payload, err := openEnvelope(d, charter, key)
		if err != nil {
			return fmt.Errorf("charter: %w", err)
		}
		var c struct {
			Format string `json:"format"`
			Tenant string `json:"tenant"`
			Site   string `json:"site"`
		}
		if err := json.Unmarshal(payload, &c); err != nil {
			return fmt.Errorf("charter: %w", err)
		}
		if c.Format != "muster/charter/v1" || c.Tenant != r.Tenant || c.Site != r.Site {
			return fmt.Errorf("charter: %s of tenant %q and site %q, want those of the request", c.Format, c.Tenant, c.Site)
		}
	}
	payload, err := openEnvelope(byKind[admission][0], admission, key)
	if err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	var a struct {
		Format      string    `json:"format"`
		Tenant      string    `json:"tenant"`
		Site        string    `json:"site"`
		Node        string    `json:"node"`
		Incarnation uint64    `json:"incarnation"`
		LDevIDKey   string    `json:"ldevid_key"`
		Issued      time.Time `json:"issued"`
	}
	if err := json.Unmarshal(payload, &a); err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	var errs []error
	for _, f := range []struct{ what, got, want string }{
		{"format", a.Format, "muster/admission/v1"}, {"tenant", a.Tenant, r.Tenant}, {"site", a.Site, r.Site},
		{"node", a.Node, string(r.Node)}, {"LDevID key", a.LDevIDKey, hex.EncodeToString(r.Evidence.LDevIDKey)},
	} {
		if f.got != f.want || f.want == "" {
			errs = append(errs, fmt.Errorf("admission: %s is %q, want %q", f.what, f.got, f.want))
		}
	}
	if a.Incarnation == 0 {
		errs = append(errs, errors.New("admission: no incarnation"))
	}
	if a.Issued.Before(r.FirstSeen.Add(-time.Minute)) || a.Issued.After(now.Add(time.Minute)) {
		errs = append(errs, fmt.Errorf("admission: issued at %v", a.Issued))
	}
	return errors.Join(errs...)
}

// openEnvelope verifies a DSSE v1 envelope with one signature.
func openEnvelope(envelope []byte, kind string, key any) ([]byte, error) {
	var e struct {
		PayloadType string `json:"payloadType"`
		Payload     []byte `json:"payload"`
		Signatures  []struct {
			Sig []byte `json:"sig"`
		} `json:"signatures"`
	}
	if err := json.Unmarshal(envelope, &e); err != nil {
		return nil, err
	}
	if e.PayloadType != kind || len(e.Signatures) != 1 {
		return nil, fmt.Errorf("payload type %q with %d signatures, want %q with one", e.PayloadType, len(e.Signatures), kind)
	}
	// The pre-authentication encoding of the DSSE protocol.
	signed := fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(kind), kind, len(e.Payload), e.Payload)
	good := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(signed)
		good = ecdsa.VerifyASN1(k, sum[:], e.Signatures[0].Sig)
	case ed25519.PublicKey:
		good = ed25519.Verify(k, signed, e.Signatures[0].Sig)
	default:
		return nil, fmt.Errorf("the orders key is a %T", key)
	}
	if !good {
		return nil, errors.New("the orders key did not sign it")
	}
	return e.Payload, nil
}
