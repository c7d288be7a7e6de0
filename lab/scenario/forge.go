package scenario

import (
	"bytes"
	"debug/pe"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// forge copies a recovery image and changes one letter in it, in a section
// that is measured and signed and changes nothing of how the image runs: the
// smallest forgery there is. An attacker would change more and show more.
func forge(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("scenario: forge image: %w", err)
	}
	if err := alter(b); err != nil {
		return fmt.Errorf("scenario: forge image: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("scenario: forge image: %w", err)
	}
	if err := os.WriteFile(to, b, 0o644); err != nil {
		return fmt.Errorf("scenario: forge image: %w", err)
	}
	return nil
}

// alter changes the first small letter of section .osrel, in place.
func alter(image []byte) error {
	f, err := pe.NewFile(bytes.NewReader(image))
	if err != nil {
		return err
	}
	defer f.Close()
	s := f.Section(".osrel")
	if s == nil {
		return errors.New("no section .osrel: this is no unified kernel image")
	}
	if uint64(s.Offset)+uint64(s.Size) > uint64(len(image)) {
		return errors.New("section .osrel reaches beyond the file")
	}
	text := image[s.Offset : s.Offset+s.Size]
	for i, c := range text {
		if c >= 'a' && c < 'z' {
			text[i]++
			return nil
		}
	}
	return errors.New("section .osrel has no letter to change")
}
