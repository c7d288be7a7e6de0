package image

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// RecoveryGoal is the size in bytes that a recovery image should not exceed:
// more takes too long over TFTP and too much of 1 GB of memory.
const RecoveryGoal = 40_000_000

// Check is one finding of Verify.
type Check struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Detail says what was found, or what is wrong.
	Detail string `json:"detail"`
}

// Verify checks the image in dir against its manifest, whose signature must be
// by one of keys, and recomputes every measurement from the file. Checks that
// failed are in the list; an error means that nothing could be checked.
func Verify(dir string, keys []crypto.PublicKey) ([]Check, error) {
	manifest, err := findManifest(dir)
	if err != nil {
		return nil, err
	}
	envelope, err := readCapped(manifest, fleet.MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("image: verify: %w", err)
	}
	var checks []Check
	add := func(name string, ok bool, format string, args ...any) bool {
		checks = append(checks, Check{name, ok, fmt.Sprintf(format, args...)})
		return ok
	}
	m, err := firmware.OpenManifest(envelope, keys)
	if err != nil {
		// Unsigned statements are not worth comparing with.
		add("manifest", false, "%v", err)
		return checks, nil
	}
	add("manifest", true, "%s@%s, %s for %s, signed by a release key", m.Name, m.Version, m.Kind, m.Arch)

	efi, err := readCapped(filepath.Join(dir, m.File), maxImage)
	if err != nil {
		add("file", false, "%v", err)
		return checks, nil
	}
	add("size", int64(len(efi)) == m.Size, "%d bytes, the manifest says %d", len(efi), m.Size)
	sum := firmware.Digest(sha256.Sum256(efi))
	add("sha256", sum == m.SHA256, "%s%s", sum, unlike(sum, m.SHA256))

	pe, err := firmware.ParsePE(efi)
	if err != nil {
		add("format", false, "%v", err)
		return checks, nil
	}
	add("format", pe.Arch == m.Arch, "PE32+ for %s with %d sections", pe.Arch, len(pe.Sections))
	measured, err := Measure(efi)
	if err != nil {
		add("measurements", false, "%v", err)
		return checks, nil
	}
	add("authenticode (PCR 4)", measured.Authenticode == m.Measurements.Authenticode, "%s%s", measured.Authenticode, unlike(measured.Authenticode, m.Measurements.Authenticode))
	add("kernel (PCR 4, Secure Boot off)", measured.Kernel == m.Measurements.Kernel, "%s%s", measured.Kernel, unlike(measured.Kernel, m.Measurements.Kernel))
	for i, s := range measured.Sections {
		want := firmware.SectionDigest{}
		if i < len(m.Measurements.Sections) {
			want = m.Measurements.Sections[i]
		}
		add("section "+s.Name, s == want, "%s%s", s.SHA256, unlike(s.SHA256, want.SHA256))
	}
	add("number of sections", len(measured.Sections) == len(m.Measurements.Sections), "%d measured, the manifest names %d", len(measured.Sections), len(m.Measurements.Sections))
	add("PCR 11", measured.PCR11 == m.Measurements.PCR11, "%s%s", measured.PCR11, unlike(measured.PCR11, m.Measurements.PCR11))
	checkSignature(pe, m, measured.Authenticode, add)
	if m.Slot != nil {
		checkSlot(dir, m, measured, sectionText(pe, firmware.SectionCmdline), add)
	}
	checkMedia(dir, m, add)
	lock := LockFile
	if m.Slot != nil {
		lock = slotFile(m.Name, m.Version, "lock.json")
	}
	checkLock(dir, lock, m, add)
	return checks, nil
}

// checkMedia wants each medium to be what the manifest says, and to hold the
// image at the place firmware boots it from. A boot host needs no media, so
// one that is not here is said and is no failure.
func checkMedia(dir string, m firmware.Manifest, add func(string, bool, string, ...any) bool) {
	for _, d := range m.Media {
		name := "medium " + d.Format
		data, err := readCapped(filepath.Join(dir, d.File), maxImage)
		if errors.Is(err, os.ErrNotExist) {
			add(name, true, "%s is not here and was not checked", d.File)
			continue
		}
		if err != nil {
			add(name, false, "%v", err)
			continue
		}
		sum := firmware.Digest(sha256.Sum256(data))
		if !add(name, sum == d.SHA256 && int64(len(data)) == d.Size, "%s: %d bytes, sha256 %s%s", d.File, len(data), sum, unlike(sum, d.SHA256)) {
			continue
		}
		held := d.Size // nothing held
		if m.Size <= maxMedium {
			held = int64(layout{fat: newFATLayout(int(m.Size))}.fileSector()) * sectorSize
		}
		if held+m.Size > d.Size || sha256.Sum256(data[held:held+m.Size]) != m.SHA256 {
			add(name+": image", false, "it does not hold the image of this manifest")
		}
	}
}

// checkLock wants the lock beside the image, if there is one, to name the
// packages that the manifest does: a later build will trust it.
func checkLock(dir, name string, m firmware.Manifest, add func(string, bool, string, ...any) bool) {
	text, err := readCapped(filepath.Join(dir, name), maxLock)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var lock *Lock
	if err == nil {
		lock, err = ParseLock(text)
	}
	if err != nil {
		add("lock", false, "%v", err)
		return
	}
	for _, p := range lock.Packages {
		if !slices.Contains(m.Inputs, firmware.Input(p)) {
			add("lock", false, "it names %s %s, which did not go into this image", p.Name, p.Version)
			return
		}
	}
	add("lock", true, "%d packages, all named by the manifest", len(lock.Packages))
}

// checkSignature looks at the Secure Boot signature.
func checkSignature(pe *firmware.PE, m firmware.Manifest, digest firmware.Digest, add func(string, bool, string, ...any) bool) {
	want := m.SecureBoot.SignerCertSHA256
	if want.IsZero() {
		add("secure boot", !pe.Signed(), "the manifest says unsigned; the file has a signature: %v", pe.Signed())
		return
	}
	cert, err := pe.Signer(digest)
	if err != nil {
		add("secure boot", false, "%v", err)
		return
	}
	got := firmware.Digest(sha256.Sum256(cert.Raw))
	add("secure boot", got == want, "signed by %q, certificate %s%s", cert.Subject, got, unlike(got, want))
}

// unlike adds the expected digest to a line, only where it helps.
func unlike(got, want firmware.Digest) string {
	if got == want {
		return ""
	}
	return ", the manifest says " + want.String()
}

// readCapped reads a file of at most limit bytes.
func readCapped(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, nil
}
