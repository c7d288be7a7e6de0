package scenario

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/muster-edge/muster/firmware/secureboot"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// httpsRoots is the file that stands for what a person enrols in the firmware's
// setup menu.
func httpsRoots(l *lab.Lab) string { return l.Path("https-ca.esl") }

// enrolHTTPSRoot puts the boot host's CA, as it lies in the data directory, into
// the form of the firmware.
func enrolHTTPSRoot(l *lab.Lab) error {
	text, err := os.ReadFile(filepath.Join(centreDir(l), "boot", "https-ca.pem"))
	if err != nil {
		return fmt.Errorf("scenario: read HTTPS CA: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return errors.New("scenario: read HTTPS CA: no certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("scenario: read HTTPS CA: %w", err)
	}
	if err := os.WriteFile(httpsRoots(l), secureboot.SignatureList(cert), 0o644); err != nil {
		return fmt.Errorf("scenario: enrol HTTPS CA: %w", err)
	}
	return nil
}

var httpsLine = regexp.MustCompile(`URI: https://`)

// byHTTPS: each machine's firmware says so. The boot host gives no plain URL.
func byHTTPS(machines []*machine.Machine) error {
	var errs []error
	for _, m := range machines {
		if _, ok := m.Serial().Find(httpsLine); !ok {
			errs = append(errs, fmt.Errorf("%s came another way", m.Name()))
		}
	}
	return errors.Join(errs...)
}
