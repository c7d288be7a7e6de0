package central

import (
	"crypto"
	"encoding/json"
	"fmt"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/fleet/statement"
)

// Kinds of documents in the store.
const (
	docCharter   = "charter"
	docAdmission = "admission"
	docRemoval   = "removal"
)

// scribe signs documents with the tenants' orders keys.
type scribe struct {
	key func(tenant string) (crypto.Signer, error)
}

// document is something that can be signed.
type document interface{ Validate() error }

// sign validates v, signs it and returns the envelope's JSON.
func (w scribe) sign(tenant, payloadType string, v document) ([]byte, error) {
	if err := v.Validate(); err != nil {
		return nil, err
	}
	key, err := w.key(tenant)
	if err != nil {
		return nil, fmt.Errorf("central: sign document: %w", err)
	}
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("central: sign document: %w", err)
	}
	env, err := statement.Sign(payloadType, payload, key)
	if err != nil {
		return nil, fmt.Errorf("central: sign document: %w", err)
	}
	b := env.JSON()
	if len(b) > fleet.MaxEnvelope {
		return nil, fmt.Errorf("central: sign document: envelope of %d bytes, nodes keep at most %d", len(b), fleet.MaxEnvelope)
	}
	return b, nil
}

// issue signs a document for a site, keeps it, records it, and moves the
// site's revision of documents; the caller writes the site.
func (w scribe) issue(t store.Tx, by act, site *fleet.Site, kind, name, payloadType string, v document, version fleet.DocVersion, reason string) ([]byte, error) {
	envelope, err := w.sign(site.Tenant, payloadType, v)
	if err != nil {
		return nil, err
	}
	if err := t.AddDocument(store.Document{
		Tenant: site.Tenant, Kind: kind, Name: name, Site: site.Name, Version: version, At: by.now, Envelope: envelope,
	}); err != nil {
		return nil, err
	}
	object, kindOf := "node/"+name, audit.AdmissionIssued
	switch kind {
	case docCharter:
		object, kindOf = "site/"+name, audit.CharterIssued
	case docRemoval:
		kindOf = audit.RemovalIssued
	}
	site.Ledger.Documents = version
	return envelope, by.record(t, site.Tenant, kindOf, object, nil, v, reason)
}

// said reads the payload of one of our own envelopes.
func said(envelope []byte, v any) error {
	env, err := statement.Parse(envelope)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(env.Payload, v); err != nil {
		return fmt.Errorf("central: read document: %w", err)
	}
	return nil
}
