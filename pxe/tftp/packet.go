package tftp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Opcodes of RFC 1350 section 5 and RFC 2347.
const (
	opRead  = 1
	opWrite = 2
	opData  = 3
	opAck   = 4
	opError = 5
	opOAck  = 6
)

// Error codes of RFC 1350 section 5 and RFC 2347.
const (
	codeUndefined = 0
	codeNotFound  = 1
	codeViolation = 2
	codeIllegal   = 4
	codeOptions   = 8
)

const (
	// defaultBlock is the block size without options (RFC 1350).
	defaultBlock = 512
	// maxRequest bounds a request packet: RFC 2347 says 512 octets.
	maxRequest = 512
	// maxOptions bounds the options that are looked at.
	maxOptions = 16
)

// request is a read request, understood.
type request struct {
	name string
	// block, window are what was asked for, 0 if nothing was.
	block, window int
	// size is true if the file's size is asked for.
	size bool
}

var (
	errNotRead  = errors.New("tftp: not a read request")
	errMalform  = errors.New("tftp: malformed request")
	errNotOctet = errors.New("tftp: only octet transfers are served")
)

// parseRequest reads a request from the network. An option that makes no
// sense is left out, which refuses it (RFC 2347); a request that makes none is
// an error.
func parseRequest(b []byte) (request, error) {
	var r request
	if len(b) < 6 || len(b) > maxRequest {
		return r, errMalform
	}
	switch op := binary.BigEndian.Uint16(b); op {
	case opRead:
	case opWrite:
		return r, errNotRead
	default:
		return r, errMalform
	}
	// name NUL mode NUL (option NUL value NUL)*; some firmware pads with
	// zeros, some leaves out the last one.
	parts := strings.Split(string(b[2:]), "\x00")
	if len(parts) < 3 {
		return r, errMalform
	}
	r.name = parts[0]
	if !strings.EqualFold(parts[1], "octet") {
		return r, errNotOctet
	}
	opts := parts[2:]
	for i := 0; i+1 < len(opts) && i < 2*maxOptions; i += 2 {
		v, err := strconv.Atoi(opts[i+1])
		if opts[i] == "" || err != nil || v < 0 {
			continue
		}
		switch strings.ToLower(opts[i]) {
		case "blksize":
			// Below 512 (RFC 2348 allows 8) one request would make us send
			// a hundred packets per kilobyte.
			if v >= defaultBlock && v <= 65464 {
				r.block = v
			}
		case "windowsize":
			if v >= 1 && v <= 65535 {
				r.window = v
			}
		case "tsize":
			r.size = true
		}
	}
	return r, nil
}

// oack is the answer to a request's options, nil if there is none to give.
func oack(block, window int, size int64) []byte {
	b := []byte{0, opOAck}
	add := func(k string, v int64) {
		b = append(append(append(append(b, k...), 0), strconv.FormatInt(v, 10)...), 0)
	}
	if size >= 0 {
		add("tsize", size)
	}
	if block > 0 {
		add("blksize", int64(block))
	}
	if window > 0 {
		add("windowsize", int64(window))
	}
	if len(b) == 2 {
		return nil
	}
	return b
}

func errorPacket(code uint16, message string) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, opError}, code)
	return append(append(b, message...), 0)
}

// clientError is an ERROR packet of a client.
type clientError struct {
	code uint16
	// early: it came before the second block, as the end of a size probe
	// does.
	early bool
	// aborted: it says so, in any case of letters.
	aborted bool
}

func (e *clientError) Error() string { return fmt.Sprintf("tftp: client said code=%d", e.code) }

// probe recognises the end of a size probe: firmware asks for tsize, learns
// it from the OACK and aborts. EDK2 sends code 8 "User aborted the transfer"
// (RFC 2347); AMI and others send code 0 with words to that effect, and some
// acknowledge the OACK first.
func (e *clientError) probe() bool {
	return e.early && (e.code == codeOptions || e.code == codeUndefined && e.aborted)
}

// parseReply reads what a client sends in a transfer: ack is true for an
// acknowledgement of block.
func parseReply(b []byte) (block uint16, ack bool, gone *clientError) {
	if len(b) < 4 {
		return 0, false, nil
	}
	switch binary.BigEndian.Uint16(b) {
	case opAck:
		return binary.BigEndian.Uint16(b[2:]), true, nil
	case opError:
		return 0, false, &clientError{code: binary.BigEndian.Uint16(b[2:]), aborted: strings.Contains(strings.ToLower(string(b[4:])), "abort")}
	}
	return 0, false, nil
}
