package pki

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// evNoAction marks an entry of the log that was not extended, TCG PC Client
// Platform Firmware Profile §10.4.1.
const evNoAction uint32 = 0x3

// Standard measurements that are no programs: the separator at the end of
// the firmware's part, and the strings a boot manager measures into PCR 4
// around each attempt (TCG PC Client Platform Firmware Profile §10.4.4).
var (
	separator  = sha256.Sum256([]byte{0, 0, 0, 0})
	bootAction = map[[32]byte]string{
		separator: "separator",
		sha256.Sum256([]byte("Calling EFI Application from Boot Option")):        "calling a boot option",
		sha256.Sum256([]byte("Returning from EFI Application from Boot Option")): "returning from a boot option",
	}
)

// boot judges what the machine runs. It cannot refuse: a machine with any
// other boot is a machine with unknown boot.
func (v *verifier) boot(ev Evidence, pol Policy) {
	image, err := v.measured(ev, pol)
	if err != nil {
		v.find("boot-measured", false, err.Error())
		v.warn("What the machine runs is not proved: %s.", err)
		return
	}
	v.out.Boot, v.out.Image = fleet.BootMeasured, image.ID()
	v.find("boot-measured", true, image.ID())
	if err := enforced(ev.Log, image); err != nil {
		v.find("boot-enforced", false, err.Error())
		v.drivers(ev)
		return
	}
	v.out.Boot = fleet.BootEnforced
	v.find("boot-enforced", true, "")
}

// measured finds the registered image that runs, or says why it cannot.
// Decisions rest on digests that replay to quoted values; the types in the
// log decide nothing, since nothing protects them.
func (v *verifier) measured(ev Evidence, pol Policy) (fleet.Image, error) {
	none := fleet.Image{}
	for _, i := range []int{0, 2, 4, 7} {
		if blank(ev.PCRs[i]) {
			// Anybody could extend "good" values into a PCR that the firmware
			// left alone.
			return none, fmt.Errorf("the firmware did not measure into PCR %d", i)
		}
	}
	switch {
	case ev.LogError != nil:
		return none, fmt.Errorf("the event log cannot be read: %s", printable(ev.LogError.Error()))
	case len(ev.Log) == 0:
		return none, fmt.Errorf("there is no event log")
	case len(ev.Log) > maxLogEvents:
		return none, fmt.Errorf("the event log has %d events", len(ev.Log))
	}
	replayed := Replay(ev.Log)
	for _, i := range []int{4, 7, 11} {
		r := replayed[i]
		if !bytes.Equal(r[:], ev.PCRs[i]) {
			return none, fmt.Errorf("the event log does not replay to PCR %d", i)
		}
	}
	for _, i := range []int{0, 2} {
		// Diagnosis only: real firmware gets these wrong.
		r := replayed[i]
		v.find(fmt.Sprintf("log-pcr%d", i), bytes.Equal(r[:], ev.PCRs[i]), "")
	}
	images, err := programs(ev.Log, pol.Images)
	if err != nil {
		return none, err
	}
	// The stub measures a command line that overrides the image's own, and
	// credentials from beside it, into PCR 12. With Secure Boot off it obeys
	// them, so the image is only itself while that PCR is untouched.
	if !allZero(ev.PCRs[12]) {
		return none, fmt.Errorf("the kernel command line or credentials came from outside the image (PCR 12)")
	}
	for _, image := range images {
		if isDigest(image.PCR11, replayed[11]) {
			return image, nil
		}
	}
	return none, fmt.Errorf("the value of PCR 11 is not that of image %s", images[0].ID())
}

// drivers tells of what ran before the image without anybody's word for it:
// option ROMs, and drivers that the firmware loaded from a disk or the network
// (PCR 2). Such a program may change the image in memory after it was
// measured, and there is no list of good ones: people compare machines.
func (v *verifier) drivers(ev Evidence) {
	n, last := 0, [32]byte{}
	for _, e := range ev.Log {
		if e.PCR == 2 && e.Type != evNoAction && e.Digest != separator {
			n, last = n+1, e.Digest
		}
	}
	r := Replay(ev.Log)[2]
	switch {
	case !bytes.Equal(r[:], ev.PCRs[2]):
		v.find("drivers", false, "the log does not tell which option ROMs and drivers ran before the image (PCR 2)")
	case n > 0:
		v.find("drivers", false, fmt.Sprintf("%d option ROMs or drivers ran before the image and nobody vouches for them (PCR 2; the last is %x...)", n, last[:8]))
	default:
		v.find("drivers", true, "none ran before the image")
	}
}

// programs returns the registered images among the digests of PCR 4, and an
// error if there is none or if anything else was run.
//
// While Secure Boot is off, the stub of a unified kernel image loads the
// kernel inside through the firmware, which measures it as one more program.
// That is accepted directly after the image's own event and nowhere else: a
// kernel that was started without its image obeys any command line.
//
// A boot loader is accepted if a registered image names it; alone it is no
// image. It may come twice, when what it started first did not load.
func programs(log []LogEvent, images []fleet.Image) ([]fleet.Image, error) {
	var found, started []fleet.Image // started: by the event just before
	for _, e := range log {
		if e.PCR != 4 || e.Type == evNoAction {
			continue
		}
		kernel := false
		for _, image := range started {
			kernel = kernel || isDigest(image.Kernel, e.Digest)
		}
		started = nil
		if _, ok := bootAction[e.Digest]; ok || kernel {
			continue
		}
		loader := false
		for _, image := range images {
			if isDigest(image.Authenticode, e.Digest) {
				started = append(started, image)
			}
			loader = loader || isDigest(image.Loader, e.Digest)
		}
		if len(started) == 0 && loader {
			continue
		}
		if len(started) == 0 {
			return nil, fmt.Errorf("a program that is not ours was started (digest %x)", e.Digest)
		}
		found = append(found, started...)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no registered image was started")
	}
	return found, nil
}

// isDigest compares what an image promises with a measured digest.
func isDigest(promised fleet.HexBytes, digest [32]byte) bool {
	return len(promised) == sha256.Size && bytes.Equal(promised, digest[:])
}

// Replay computes the SHA-256 PCR values that a log leads to. PCR 0 starts
// at the locality that a StartupLocality event tells (TCG PC Client Platform
// Firmware Profile §10.4.5.3), all others at zero. Events with indices
// outside 0-23 are ignored.
func Replay(log []LogEvent) map[int][32]byte {
	values := map[int][32]byte{}
	for i := range 24 {
		values[i] = [32]byte{}
	}
	prefix := []byte("StartupLocality\x00")
	for _, e := range log {
		if e.PCR < 0 || e.PCR > 23 {
			continue
		}
		v := values[e.PCR]
		if e.Type == evNoAction {
			if e.PCR == 0 && v == ([32]byte{}) && len(e.Data) == len(prefix)+1 && bytes.HasPrefix(e.Data, prefix) {
				v[31] = e.Data[len(prefix)]
				values[0] = v
			}
			continue
		}
		values[e.PCR] = sha256.Sum256(append(v[:], e.Digest[:]...))
	}
	return values
}

// blank reports a PCR that was never extended: all zeros, or all ones for
// those that start so.
func blank(v []byte) bool {
	return allZero(v) || len(bytes.Trim(v, "\xff")) == 0
}

func allZero(v []byte) bool { return len(bytes.Trim(v, "\x00")) == 0 }

var errSecureBootOff = errors.New("firmware runs with Secure Boot off")

// enforced checks the PCR 7 part of a log that is known to replay: Secure
// Boot was on before any program could run, and every program was admitted
// by the certificate that signed the image, nothing else.
func enforced(log []LogEvent, image fleet.Image) error {
	if len(image.SignerCert) != sha256.Size {
		return fmt.Errorf("the image is not signed")
	}
	var on, separated bool
	authorities := 0
	for _, e := range log {
		if e.PCR != 7 || e.Type == evNoAction {
			continue
		}
		if e.Digest == separator {
			if separated {
				return fmt.Errorf("there are two separators in PCR 7")
			}
			separated = true
			continue
		}
		// The digest is recomputed from the data: only so is the data proved.
		variable, err := parseVariable(e.Data)
		if err != nil || sha256.Sum256(e.Data) != e.Digest {
			return fmt.Errorf("there is a measurement in PCR 7 that its data does not explain")
		}
		if !separated {
			if err := configuration(variable, &on); err != nil {
				return err
			}
			continue
		}
		if err := authority(variable, image); err != nil {
			return err
		}
		authorities++
	}
	switch {
	case !on:
		return errSecureBootOff
	case !separated:
		return fmt.Errorf("there is no separator in PCR 7")
	case authorities == 0:
		return fmt.Errorf("no program was admitted by Secure Boot")
	}
	return nil
}

// configuration looks at a Secure Boot variable measured before the
// separator: SecureBoot must be 1, and once; PK, KEK, db, dbx may be anything,
// since what counts is which entry of db was used.
func configuration(variable efiVariable, on *bool) error {
	switch variable.Name {
	case "SecureBoot":
		if variable.GUID != guidGlobal {
			return fmt.Errorf("variable SecureBoot has a foreign GUID")
		}
		if !bytes.Equal(variable.Data, []byte{1}) {
			return errSecureBootOff
		}
		if *on {
			return fmt.Errorf("variable SecureBoot was measured twice")
		}
		*on = true
	case "AuditMode":
		if !allZero(variable.Data) {
			return fmt.Errorf("firmware is in audit mode")
		}
	case "PK", "KEK", "db", "dbx", "dbt", "dbr", "DeployedMode", "SetupMode", "VendorKeys":
	default:
		return fmt.Errorf("there is an unknown variable in PCR 7, %q", printable(variable.Name))
	}
	return nil
}

// authority looks at what admitted a program: the db entry, an
// EFI_SIGNATURE_DATA of 16 bytes of owner and the certificate (UEFI §32.4.1).
func authority(variable efiVariable, image fleet.Image) error {
	if variable.Name != "db" || variable.GUID != guidImageSecurity {
		return fmt.Errorf("a program was admitted by %q, not by db", printable(variable.Name))
	}
	if len(variable.Data) <= 16 {
		return fmt.Errorf("a program was admitted by an empty db entry")
	}
	if got := sha256.Sum256(variable.Data[16:]); !bytes.Equal(got[:], image.SignerCert) {
		return fmt.Errorf("a program was admitted by a certificate that is not ours (%s...)", strings.ToLower(fmt.Sprintf("%x", got[:8])))
	}
	return nil
}
