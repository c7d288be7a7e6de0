package enroll

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// A claim code is 14 random characters and a check character, shown as three
// groups of five: 70 bits, read over the telephone and typed by hand.
const (
	claimRandom = 14
	claimGroup  = 5
	// MaxClaim bounds a code as it is sent, with whatever separates its groups.
	MaxClaim = 64
	// claimAlphabet is Crockford's base 32: no I, L, O, U.
	claimAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

	domainClaim = "muster/enroll/v1/claim"
)

// errClaim does not repeat the code: it may be a good one with a slip.
var errClaim = errors.New("enroll: claim code: want 15 characters 0-9 A-Z in three groups; check what was typed")

// NewClaim makes a code from the random source and the hash that is kept.
func NewClaim(random io.Reader) (code string, hash fleet.HexBytes, err error) {
	b := make([]byte, claimRandom)
	if _, err := io.ReadFull(random, b); err != nil {
		return "", nil, fmt.Errorf("enroll: make claim code: %w", err)
	}
	for i := range b {
		b[i] &= 31
	}
	b = append(b, claimCheck(b))
	var out strings.Builder
	for i, v := range b {
		if i > 0 && i%claimGroup == 0 {
			out.WriteByte('-')
		}
		out.WriteByte(claimAlphabet[v])
	}
	return out.String(), hashClaim(b), nil
}

// HashClaim reads a code as people type it and returns the hash it is known
// by. Case, spaces and dashes do not matter, O is read as 0, I and L as 1.
// One wrong character, or two that changed places, are always noticed.
func HashClaim(code string) (fleet.HexBytes, error) {
	if len(code) > MaxClaim {
		return nil, errClaim
	}
	var b []byte
	for _, c := range strings.ToUpper(code) {
		switch c {
		case ' ', '-':
			continue
		case 'O':
			c = '0'
		case 'I', 'L':
			c = '1'
		}
		v := strings.IndexRune(claimAlphabet, c)
		if v < 0 || len(b) > claimRandom {
			return nil, errClaim
		}
		b = append(b, byte(v))
	}
	if len(b) != claimRandom+1 || claimCheck(b[:claimRandom]) != b[claimRandom] {
		return nil, errClaim
	}
	return hashClaim(b), nil
}

// hashClaim needs no slow hash: nobody guesses 70 random bits.
func hashClaim(b []byte) fleet.HexBytes {
	h := sha256.Sum256(append([]byte(domainClaim), b...))
	return h[:]
}

// claimCheck is the sum of a^i times the i-th character in GF(32) with
// a^5 = a^2 + 1. The weights differ, so that a wrong character and a swap of
// any two change the sum.
func claimCheck(b []byte) byte {
	var sum byte
	for i := len(b) - 1; i >= 0; i-- {
		// Horner: sum = (sum + b[i]) * a.
		sum ^= b[i]
		if sum <<= 1; sum&32 != 0 {
			sum ^= 0b100101
		}
	}
	return sum
}
