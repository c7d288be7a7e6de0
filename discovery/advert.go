package discovery

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
)

// Service and Domain name what adverts are published under (RFC 6763 §7).
const (
	Service = "_muster._tcp"
	Domain  = "local"
)

// SiteTag names a site in adverts without saying its name: 16 characters
// a-z2-7. Who guesses tenant and site can confirm the guess; nobody can read
// them from it.
type SiteTag string

const (
	tagBytes  = 10
	nameLen   = 16 // of tags and instance labels: base32 of 10 bytes
	tagDomain = "muster/discovery/v1/site"
	tagKey    = "site"

	// maxTXT bounds the strings of a TXT record that are looked at.
	maxTXT = 16
)

var lowerBase32 = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Tag derives the tag of a site: the first 10 bytes of SHA-256 over the
// length-prefixed domain, tenant and site.
func Tag(tenant, site string) SiteTag {
	h := sha256.New()
	for _, f := range []string{tagDomain, tenant, site} {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(f)))
		h.Write(n[:])
		h.Write([]byte(f))
	}
	return SiteTag(lowerBase32.EncodeToString(h.Sum(nil)[:tagBytes]))
}

// Validate reports whether t has the form of a tag.
func (t SiteTag) Validate() error {
	if !isName(string(t)) {
		return fmt.Errorf("discovery: site tag: want %d characters a-z2-7", nameLen)
	}
	return nil
}

// TXT returns the strings of the advert's TXT record: the tag, nothing else.
func (t SiteTag) TXT() []string { return []string{tagKey + "=" + string(t)} }

// ErrNotOurs is returned for records that belong to some other program.
var ErrNotOurs = errors.New("discovery: not an advert of ours")

// ParseTXT reads the tag from the strings of a TXT record. Unknown keys are
// ignored and the first of equal keys counts (RFC 6763 §6.4).
func ParseTXT(strs []string) (SiteTag, error) {
	if len(strs) > maxTXT {
		return "", fmt.Errorf("discovery: read TXT: more than %d strings", maxTXT)
	}
	for _, s := range strs {
		key, value, _ := strings.Cut(s, "=")
		if !strings.EqualFold(key, tagKey) {
			continue
		}
		if t := SiteTag(value); t.Validate() == nil {
			return t, nil
		}
		return "", fmt.Errorf("discovery: read TXT: %q is no site tag", clip(value))
	}
	return "", ErrNotOurs
}

// NewLabel makes the instance label of one run of an advertiser. It is random
// so that it says nothing of the machine, and so long that two hosts never
// draw the same: that is why there is no probing (RFC 6762 §8.1).
func NewLabel(rng *rand.Rand) string {
	var b [tagBytes]byte
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return lowerBase32.EncodeToString(b[:])
}

// ParseInstance takes the instance label from a full instance name such as
// "abcdefghijklmnop._muster._tcp.local."; names compare without case.
func ParseInstance(name string) (string, error) {
	const suffix = "." + Service + "." + Domain
	if len(name) > nameLen+len(suffix)+1 {
		return "", ErrNotOurs
	}
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	label, ok := strings.CutSuffix(name, suffix)
	if !ok || !isName(label) {
		return "", ErrNotOurs
	}
	return label, nil
}

func isName(s string) bool {
	if len(s) != nameLen {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

func clip(s string) string { return s[:min(len(s), 40)] }
