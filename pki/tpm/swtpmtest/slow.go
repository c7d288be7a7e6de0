package swtpmtest

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Slow passes commands to a TPM, each after Delay, and counts them: with
// 200 ms it behaves like a discrete TPM on a slow bus.
type Slow struct {
	transport.TPMCloser
	// Delay is added to each command.
	Delay time.Duration

	mu       sync.Mutex
	commands []string
	took     time.Duration
}

// Send implements transport.TPM.
func (s *Slow) Send(input []byte) ([]byte, error) {
	begin := time.Now()
	if s.Delay > 0 {
		timer := time.NewTimer(s.Delay)
		<-timer.C
	}
	out, err := s.TPMCloser.Send(input)
	s.mu.Lock()
	defer s.mu.Unlock()
	name := "short"
	if len(input) >= 10 {
		cc := tpm2.TPMCC(binary.BigEndian.Uint32(input[6:]))
		if name = commandNames[cc]; name == "" {
			name = fmt.Sprintf("0x%03x", uint32(cc))
		}
	}
	s.commands = append(s.commands, name)
	s.took += time.Since(begin)
	return out, err
}

// Commands returns the names of the commands so far and the time they took,
// and begins again.
func (s *Slow) Commands() ([]string, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, t := s.commands, s.took
	s.commands, s.took = nil, 0
	return c, t
}

var commandNames = map[tpm2.TPMCC]string{
	tpm2.TPMCCCreatePrimary:      "CreatePrimary",
	tpm2.TPMCCGetCapability:      "GetCapability",
	tpm2.TPMCCNVReadPublic:       "NV_ReadPublic",
	tpm2.TPMCCNVRead:             "NV_Read",
	tpm2.TPMCCReadPublic:         "ReadPublic",
	tpm2.TPMCCFlushContext:       "FlushContext",
	tpm2.TPMCCStartAuthSession:   "StartAuthSession",
	tpm2.TPMCCPolicySecret:       "PolicySecret",
	tpm2.TPMCCPolicyOR:           "PolicyOR",
	tpm2.TPMCCActivateCredential: "ActivateCredential",
	tpm2.TPMCCCertify:            "Certify",
	tpm2.TPMCCQuote:              "Quote",
	tpm2.TPMCCPCRRead:            "PCR_Read",
	tpm2.TPMCCSign:               "Sign",
}
