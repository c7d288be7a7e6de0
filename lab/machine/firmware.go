package machine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// QEMU is the program that runs a machine.
const QEMU = "qemu-system-x86_64"

// SnakeoilKey and SnakeoilCert are the Secure Boot key that Debian's ovmf
// package publishes with SnakeoilPassword: the db key of machines with
// SecureBoot. Everybody has it; it protects nothing outside a lab.
const (
	SnakeoilKey      = "/usr/share/ovmf/PkKek-1-snakeoil.key"
	SnakeoilCert     = "/usr/share/ovmf/PkKek-1-snakeoil.pem"
	SnakeoilPassword = "snakeoil"
)

type firmware struct {
	code string // read-only program
	vars string // template of the variable store
	smm  bool
}

// firmwareFolders are where distributions put OVMF.
var firmwareFolders = []string{"/usr/share/OVMF", "/usr/share/edk2/ovmf", "/usr/share/edk2/x64"}

// findFirmware finds OVMF on this host. The images with a 4 MB flash are the
// only ones that Debian still builds with the snakeoil keys.
func findFirmware(secureBoot bool) (firmware, error) {
	fw := firmware{code: "OVMF_CODE_4M.fd", vars: "OVMF_VARS_4M.fd"}
	if secureBoot {
		fw = firmware{code: "OVMF_CODE_4M.secboot.fd", vars: "OVMF_VARS_4M.snakeoil.fd", smm: true}
	}
	for _, dir := range firmwareFolders {
		code, vars := filepath.Join(dir, fw.code), filepath.Join(dir, fw.vars)
		if exists(code) && exists(vars) {
			return firmware{code: code, vars: vars, smm: fw.smm}, nil
		}
	}
	return firmware{}, fmt.Errorf("machine: find firmware: no %s and %s in %s", fw.code, fw.vars, strings.Join(firmwareFolders, ", "))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Missing is what a host lacks to run machines.
type Missing struct {
	// What is missing, in words.
	What string
	// Package is the Debian package that has it.
	Package string
}

// CheckHost returns what this host lacks to run machines; nothing if it can.
func CheckHost(secureBoot bool) []Missing {
	var out []Missing
	for _, p := range []struct{ program, pkg string }{
		{QEMU, "qemu-system-x86"},
		{"swtpm", "swtpm"},
		{"swtpm_setup", "swtpm-tools"},
		{"swtpm_localca", "swtpm-tools"},
		// swtpm_localca calls it, also when the authority's key is ready.
		{"certtool", "gnutls-bin"},
	} {
		if _, err := exec.LookPath(p.program); errors.Is(err, exec.ErrNotFound) {
			out = append(out, Missing{"the program " + p.program, p.pkg})
		}
	}
	if _, err := findFirmware(secureBoot); err != nil {
		out = append(out, Missing{"the UEFI firmware OVMF", "ovmf"})
	}
	if secureBoot && (!exists(SnakeoilKey) || !exists(SnakeoilCert)) {
		out = append(out, Missing{"the Secure Boot test key " + SnakeoilKey, "ovmf"})
	}
	return out
}
