package ekcert

import (
	"errors"
	"fmt"

	"github.com/google/go-attestation/attest"

	"github.com/muster-edge/muster/pki"
)

const (
	maxLog    = 1 << 20
	maxEvents = 16384
	// evNoAction entries are not extended and may lie outside all PCRs.
	evNoAction = 3
	lastPCR    = 23
)

// ParseEventLog reads a TCG 2.0 event log with a SHA-256 bank, at most 1 MiB,
// as /sys/kernel/security/tpm0/binary_bios_measurements shows it. It checks
// form only: pki.Verify replays and judges.
func ParseEventLog(raw []byte) (events []pki.LogEvent, err error) {
	defer func() {
		if r := recover(); r != nil {
			events, err = nil, fmt.Errorf("ekcert: parse event log: malformed: %v", r)
		}
	}()
	if len(raw) == 0 {
		return nil, errors.New("ekcert: parse event log: empty")
	}
	if len(raw) > maxLog {
		return nil, fmt.Errorf("ekcert: parse event log: %d bytes, at most %d", len(raw), maxLog)
	}
	log, err := attest.ParseEventLog(raw)
	if err != nil {
		return nil, fmt.Errorf("ekcert: parse event log: %w", err)
	}
	list := log.Events(attest.HashSHA256)
	if len(list) > maxEvents {
		return nil, fmt.Errorf("ekcert: parse event log: %d events, at most %d", len(list), maxEvents)
	}
	for n, e := range list {
		if e.Index < 0 || e.Index > lastPCR {
			if e.Type == evNoAction {
				continue
			}
			return nil, fmt.Errorf("ekcert: parse event log: event %d is about PCR %d", n, e.Index)
		}
		event := pki.LogEvent{PCR: e.Index, Type: uint32(e.Type), Data: e.Data}
		switch len(e.Digest) {
		case len(event.Digest):
			copy(event.Digest[:], e.Digest)
		default:
			if e.Type != evNoAction {
				return nil, fmt.Errorf("ekcert: parse event log: event %d has no SHA-256 digest", n)
			}
		}
		events = append(events, event)
	}
	return events, nil
}
