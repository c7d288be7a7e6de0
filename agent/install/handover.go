package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"github.com/muster-edge/muster/firmware/efi"
)

// What recovery leaves for the system, below /muster on the ESP. All of it is
// public, and all of it is signed or worthless without the TPM's keys: whoever
// reads it believes nothing that it does not verify.
const (
	// HandOverSite is the site.json of the recovery image.
	HandOverSite = "muster/site.json"
	// HandOverIdentity is the certificate chain, as agent/member/uplink keeps it.
	HandOverIdentity = "muster/identity.json"
	// HandOverDocuments holds the signed documents.
	HandOverDocuments = "muster/documents.json"
)

// maxDocuments bounds what is read back.
const maxDocuments = 2048

// HandOver is what the first start of a system takes over.
type HandOver struct {
	Site, Identity []byte
	// Documents are DSSE envelopes: charter, admissions, removals, records,
	// orders.
	Documents [][]byte
}

// Files are the files of it, by path on the ESP.
func (h HandOver) Files() (map[string][]byte, error) {
	docs, err := json.Marshal(struct {
		Envelopes [][]byte `json:"envelopes"`
	}{h.Documents})
	if err != nil {
		return nil, fmt.Errorf("install: write documents: %w", err)
	}
	return map[string][]byte{HandOverSite: h.Site, HandOverIdentity: h.Identity, HandOverDocuments: append(docs, '\n')}, nil
}

// ReadHandOver reads what recovery left. A file that is missing leaves its
// field empty.
func ReadHandOver(e *efi.ESP) (HandOver, error) {
	var h HandOver
	var errs []error
	read := func(name string) []byte {
		b, err := e.ReadSmall(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		return b
	}
	h.Site, h.Identity = read(HandOverSite), read(HandOverIdentity)
	if b := read(HandOverDocuments); len(b) > 0 {
		var docs struct {
			Envelopes [][]byte `json:"envelopes"`
		}
		if err := json.Unmarshal(b, &docs); err != nil {
			errs = append(errs, fmt.Errorf("install: read documents: %w", err))
		}
		h.Documents = docs.Envelopes[:min(len(docs.Envelopes), maxDocuments)]
	}
	return h, errors.Join(errs...)
}
