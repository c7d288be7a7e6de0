package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/fleet/text"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// tpmError is a failure of the machine's own TPM.
type tpmError struct{ err error }

func (e *tpmError) Error() string { return "client: TPM: " + e.err.Error() }
func (e *tpmError) Unwrap() error { return e.err }

// versionError says that the centre speaks other versions.
type versionError struct{ least, most uint32 }

func (e *versionError) Error() string {
	return fmt.Sprintf("client: the centre speaks protocol %d to %d, this image speaks %d", e.least, e.most, Protocol)
}

// sentence says what is wrong and what to do, to somebody who stands before
// the machine and has no IT training.
func sentence(err error) string {
	var (
		tpm       *tpmError
		untrusted *UntrustedError
		portal    *InterceptedError
		version   *versionError
		dns       *net.DNSError
		network   net.Error
	)
	switch {
	case errors.Is(err, device.ErrOwned):
		return "The TPM of this machine belongs to somebody else. Clear the TPM in the firmware setup."
	case errors.As(err, &tpm):
		return "The TPM of this machine does not work as it should. Switch the machine off and on; if that does not help, check the TPM in the firmware setup."
	case errors.As(err, &untrusted):
		return "Somebody else answers at the centre's address, or this image is for another centre. Tell your operator: " + text.Clean(untrusted.Host, 80) + "."
	case errors.As(err, &portal):
		return "Something in this network answers in the centre's place, such as a sign-in page for guests. Use a network without one, or have it let this machine through."
	case errors.As(err, &version):
		return "This image does not fit the centre's version. Boot a current image."
	case errors.Is(err, errAgain):
		return "The request has to be made again."
	}
	switch word(err) {
	case "denied":
		return "This machine is not wanted here. Ask your operator."
	case "not-allowed":
		return "The centre's rules do not allow this machine any more as it is. Ask your operator."
	case "not-proven":
		return "The centre does not believe this machine's proof. Ask your operator."
	case "queue-full":
		return "Too many unknown machines wait at the centre. Ask your operator."
	case "busy":
		return "The centre has much to do at the moment."
	case "fault":
		return "The centre has a problem of its own. Nothing to do here."
	case "begin-again":
		return "The connection to the centre changed on the way."
	case "protocol", "bad-request", "too-large":
		return "This image and the centre do not understand each other. Ask your operator for a current image."
	case "tls":
		return "Something between this machine and the centre opens the encrypted connection. Ask your operator."
	}
	switch {
	case errors.As(err, &dns):
		return "The address of the centre (" + text.Clean(dns.Name, 80) + ") cannot be found. Check the network cable and the internet connection."
	case errors.Is(err, syscall.ECONNREFUSED):
		return "The centre's computer is there, but the centre does not run."
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return "There is no way to the centre. Check the network cable and the internet connection."
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &network) && network.Timeout():
		return "The centre does not answer. Check the internet connection."
	}
	return "The connection to the centre does not work. Check the network cable and the internet connection."
}

// maxPause is the longest pause the centre may ask for.
const maxPause = 15 * time.Minute

// retryAfter is the pause that the centre asks for, 0 if it does not.
func retryAfter(err error) time.Duration {
	var e *connect.Error
	if !errors.As(err, &e) {
		return 0
	}
	n, perr := strconv.Atoi(e.Meta().Get("Retry-After"))
	if perr != nil || n < 0 || n > int(maxPause/time.Second) {
		n = 0
		if perr == nil {
			n = int(maxPause / time.Second)
		}
	}
	if n == 0 && e.Code() == connect.CodePermissionDenied {
		n = 300
	}
	return time.Duration(n) * time.Second
}

// backoff makes pauses with decorrelated jitter: each is random between min
// and three times the one before. What exceeds max is drawn anew from the
// upper half below max, so that a crowd that waits long does not end up in
// step.
type backoff struct {
	min, max time.Duration
	last     time.Duration
}

func (b *backoff) reset() { b.last = 0 }

// next returns the pause; asked is the least that the centre wants, 0 for
// nothing.
func (b *backoff) next(asked time.Duration) time.Duration {
	b.last = max(b.last, b.min)
	d := b.min + rand.N(3*b.last-b.min+1)
	if d > b.max {
		d = b.max/2 + rand.N(b.max-b.max/2+1)
	}
	b.last = d
	if asked > d {
		d = b.jitter(asked)
	}
	return d
}

// jitter lengthens a pause by up to a quarter.
func (b *backoff) jitter(d time.Duration) time.Duration {
	return d + rand.N(d/4+1)
}
