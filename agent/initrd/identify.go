package initrd

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// identify gives the system its name and machine ID before anything can ask:
// the node's ID out of the disk's record. Both are names and prove nothing;
// what they must be is stable, so that logs and Kubernetes know the box again.
// Without a record the machine's own numbers do; without any systemd makes up
// an ID for this start.
func identify(disk string) error {
	node, err := nodeOf(disk)
	seed := string(node)
	if seed == "" {
		for _, f := range []string{"product_uuid", "product_serial", "board_serial"} {
			if b, readErr := os.ReadFile("/sys/class/dmi/id/" + f); readErr == nil {
				seed += strings.TrimSpace(string(b)) + "\x00"
			}
		}
	}
	if strings.Trim(seed, "\x00") != "" {
		if wErr := os.WriteFile(system+"/etc/machine-id", []byte(machineID(seed)+"\n"), 0o444); wErr != nil {
			err = errors.Join(err, wErr)
		}
	}
	if node != "" {
		if wErr := os.WriteFile(system+"/etc/hostname", []byte(string(node)+"\n"), 0o644); wErr != nil {
			err = errors.Join(err, wErr)
		}
	}
	if err != nil {
		return fmt.Errorf("initrd: name the system: %w", err)
	}
	return nil
}

func machineID(seed string) string {
	h := sha256.Sum256([]byte("muster/machine-id/v1\x00" + seed))
	return hex.EncodeToString(h[:16])
}

// nodeOf reads the record of the disk.
func nodeOf(disk string) (fleet.NodeID, error) {
	dirs, _ := filepath.Glob(filepath.Join("/sys/class/block", disk, disk+"*", "uevent"))
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil || !strings.Contains("\n"+string(b), "\nPARTNAME="+firmware.LabelMeta+"\n") {
			continue
		}
		return readNode(filepath.Join("/dev", filepath.Base(filepath.Dir(d))))
	}
	return "", errors.New("the disk has no partition " + firmware.LabelMeta)
}

func readNode(device string) (fleet.NodeID, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var areas [2][]byte
	for i := range areas {
		areas[i] = make([]byte, firmware.MaxMeta)
		if _, err := f.ReadAt(areas[i], int64(i)*firmware.MetaArea); err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
	}
	m, err := firmware.DecodeMeta(areas[0], areas[1])
	if err != nil {
		return "", err
	}
	return m.Node, nil
}
