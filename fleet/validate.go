package fleet

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

var (
	versionForm   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}$`)
	etcdMinorForm = regexp.MustCompile(`^[0-9]{1,4}\.[0-9]{1,4}$`)
)

// ValidateVersion checks the version of an image, a stack or an add-on: 1-128
// characters that are safe in file names and URLs.
func ValidateVersion(s string) error {
	if !versionForm.MatchString(s) {
		return fmt.Errorf("fleet: version %q: want 1-128 characters A-Z a-z 0-9 . _ + ~ -, first a letter or digit", clip(s, 80))
	}
	return nil
}

// validateImageID checks "name@version".
func validateImageID(id string) error {
	name, version, ok := strings.Cut(id, "@")
	if !ok || ValidateName("image", name) != nil || ValidateVersion(version) != nil {
		return fmt.Errorf("fleet: image %q: want NAME@VERSION", clip(id, 200))
	}
	return nil
}

// maxText bounds the short texts that people write, in bytes.
const maxText = 1024

// text checks a short text written by a person.
func (p *problems) text(field, s string) {
	p.check(len(s) <= maxText, "%s has %d bytes, at most %d are allowed", field, len(s), maxText)
	p.check(utf8.ValidString(s), "%s is not UTF-8", field)
	for _, r := range clip(s, maxText) {
		if unicode.IsControl(r) && r != '\n' && r != '\t' {
			p.check(false, "%s holds the control character %U", field, r)
			break
		}
	}
}

// sha256 checks the length of a digest; empty is good unless it is required.
func (p *problems) sha256(field string, b []byte, required bool) {
	if len(b) == 0 && !required {
		return
	}
	p.check(len(b) == 32, "%s has %d bytes; a SHA-256 digest has 32", field, len(b))
}

// format checks the format name of a signed document.
func (p *problems) format(got, want string) {
	p.check(got == want, "format is %q, want %q", clip(got, 80), want)
}

// head returns at most the first n elements, so that checking a hostile list
// costs a bounded amount.
func head[T any](list []T, n int) []T { return list[:min(n, len(list))] }
