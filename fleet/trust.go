package fleet

import "fmt"

// IdentityTrust says how sure the centre is which TPM it talked to. It is one
// of the two visible axes of trust; the other is BootTrust. Values grow with
// trust, so they can be compared with <.
type IdentityTrust uint8

const (
	// IdentityUnverified: the EK proved that it exists, nobody vouches for it.
	IdentityUnverified IdentityTrust = iota
	// IdentityLab: the EK chains to a root that was imported as a lab root.
	// It marks the tenant as a lab for ever.
	IdentityLab
	// IdentityListed: the EK hash was known to the operator beforehand.
	IdentityListed
	// IdentityHardware: the EK certificate chains to a TPM vendor's root.
	IdentityHardware
)

var identityNames = [...]string{"unverified", "lab", "listed", "hardware"}

// String returns the word used in the CLI, the API and the console.
func (t IdentityTrust) String() string { return name(identityNames[:], int(t), "identity") }

// MarshalText implements encoding.TextMarshaler.
func (t IdentityTrust) MarshalText() ([]byte, error) {
	return marshal(identityNames[:], int(t), "identity trust")
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *IdentityTrust) UnmarshalText(b []byte) error {
	i, err := unmarshal(identityNames[:], b, "identity trust")
	*t = IdentityTrust(i)
	return err
}

// BootTrust says how sure the centre is what the machine runs.
type BootTrust uint8

const (
	// BootUnknown: no event log, a log that does not replay to the quoted
	// PCRs, an unextended bank, or a program that is not ours.
	BootUnknown BootTrust = iota
	// BootMeasured: the log replays to the quoted PCRs, every program in
	// PCR 4 is ours or the firmware's standard separator, and PCR 11 equals
	// the manifest of a registered image.
	BootMeasured
	// BootEnforced: as measured, and Secure Boot was on and the image was
	// admitted by our own db certificate.
	BootEnforced
)

var bootNames = [...]string{"unknown", "measured", "enforced"}

// String returns the word used in the CLI, the API and the console.
func (t BootTrust) String() string { return name(bootNames[:], int(t), "boot") }

// MarshalText implements encoding.TextMarshaler.
func (t BootTrust) MarshalText() ([]byte, error) { return marshal(bootNames[:], int(t), "boot trust") }

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *BootTrust) UnmarshalText(b []byte) error {
	i, err := unmarshal(bootNames[:], b, "boot trust")
	*t = BootTrust(i)
	return err
}

func name(names []string, i int, kind string) string {
	if i < 0 || i >= len(names) {
		return fmt.Sprintf("%s(%d)", kind, i)
	}
	return names[i]
}

func marshal(names []string, i int, kind string) ([]byte, error) {
	if i < 0 || i >= len(names) {
		return nil, fmt.Errorf("fleet: marshal %s: no such value %d", kind, i)
	}
	return []byte(names[i]), nil
}

func unmarshal(names []string, b []byte, kind string) (int, error) {
	for i, n := range names {
		if n == string(b) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("fleet: read %s: %q is none of %v", kind, b, names)
}
