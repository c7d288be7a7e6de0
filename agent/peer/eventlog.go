package peer

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/muster-edge/muster/pki"
)

const (
	evNoAction = 0x3
	algSHA1    = 0x0004
	algSHA256  = 0x000B
	maxEvents  = 16384
	maxAlgs    = 16
	lastPCR    = 23
)

var errShortLog = errors.New("it ends in the middle of an event")

// parseEventLog reads a crypto-agile event log (TCG PC Client Platform Firmware
// Profile §10) and returns its events in the SHA-256 bank. It checks form only:
// pki.Verify replays and judges. The centre reads logs with a library that is
// too large for a node; both must come to the same, which a test compares.
func parseEventLog(b []byte) (events []pki.LogEvent, err error) {
	defer func() {
		if err != nil {
			events, err = nil, fmt.Errorf("peer: read event log: %w", err)
		}
	}()
	if len(b) > maxEventLog {
		return nil, errors.New("it is too long")
	}
	r := &logReader{b: b}
	// The first event is in the old form: TCG_PCClientPCREvent with a SHA-1
	// digest, and holds TCG_EfiSpecIDEvent.
	pcr, kind := r.u32(), r.u32()
	r.take(20)
	header := r.take(int(r.u32()))
	if r.bad {
		return nil, errShortLog
	}
	if pcr != 0 || kind != evNoAction {
		return nil, errors.New("it does not begin with the specification's event")
	}
	sizes, err := parseSpecID(header)
	if err != nil {
		return nil, err
	}
	for len(r.b) > 0 {
		if len(events) == maxEvents {
			return nil, fmt.Errorf("it has more than %d events", maxEvents)
		}
		e, ok, err := r.event(sizes)
		if err != nil {
			return nil, fmt.Errorf("event %d: %w", len(events), err)
		}
		if ok {
			events = append(events, e)
		}
	}
	return events, nil
}

// parseSpecID reads TCG_EfiSpecIDEvent (§10.4.5.1): which digests each event
// has, and how long they are.
func parseSpecID(b []byte) (map[uint16]int, error) {
	r := &logReader{b: b}
	if string(r.take(16)) != "Spec ID Event03\x00" {
		return nil, errors.New("it is not a crypto-agile log")
	}
	r.take(4 + 3) // platform class, versions and errata
	r.take(1)     // size of UINTN
	n := r.u32()
	if r.bad || n == 0 || n > maxAlgs {
		return nil, errors.New("its header names no algorithms, or too many")
	}
	sizes := map[uint16]int{}
	for range n {
		alg, size := r.u16(), int(r.u16())
		if _, twice := sizes[alg]; r.bad || twice || size == 0 || size > 128 {
			return nil, errors.New("its header names an algorithm that cannot be")
		}
		sizes[alg] = size
	}
	r.take(int(r.u8()))
	if r.bad {
		return nil, errors.New("its header is cut short")
	}
	for alg, want := range map[uint16]int{algSHA1: 20, algSHA256: 32} {
		if size, ok := sizes[alg]; ok && size != want {
			return nil, errors.New("its header gives a digest a wrong length")
		}
	}
	if sizes[algSHA256] == 0 {
		return nil, errors.New("it has no SHA-256 digests")
	}
	return sizes, nil
}

// logReader reads little-endian numbers; bad is set once the bytes are used up.
type logReader struct {
	b   []byte
	bad bool
}

func (r *logReader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *logReader) u8() uint8 {
	if b := r.take(1); !r.bad {
		return b[0]
	}
	return 0
}

func (r *logReader) u16() uint16 {
	if b := r.take(2); !r.bad {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *logReader) u32() uint32 {
	if b := r.take(4); !r.bad {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// event reads one TCG_PCR_EVENT2. ok is false for one that is about no PCR.
func (r *logReader) event(sizes map[uint16]int) (e pki.LogEvent, ok bool, err error) {
	pcr := r.u32()
	e.Type = r.u32()
	n := r.u32()
	if r.bad {
		return e, false, errShortLog
	}
	if n > maxAlgs {
		return e, false, errors.New("too many digests")
	}
	seen := map[uint16]bool{}
	for range n {
		alg := r.u16()
		size, known := sizes[alg]
		if !known || seen[alg] {
			return e, false, errors.New("a digest that the header does not announce, or twice")
		}
		seen[alg] = true
		if d := r.take(size); alg == algSHA256 && !r.bad {
			copy(e.Digest[:], d)
		}
	}
	e.Data = r.take(int(r.u32()))
	switch {
	case r.bad:
		return e, false, errShortLog
	case pcr > lastPCR && e.Type == evNoAction:
		return e, false, nil
	case pcr > lastPCR:
		return e, false, fmt.Errorf("it is about PCR %d", pcr)
	case !seen[algSHA256] && e.Type != evNoAction:
		return e, false, errors.New("no SHA-256 digest")
	}
	e.PCR = int(pcr)
	return e, true, nil
}
