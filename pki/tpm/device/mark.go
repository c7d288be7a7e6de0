package device

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// The mark is a short text in an NV index of the owner hierarchy: to which
// cluster the node belongs. It survives a new disk, and ends with TPM2_Clear,
// as the node's keys do. Who is root on the machine can change it: it is there
// against accidents, not against attackers.
//
// Every change is a new definition of the index and one write, so that the
// TPM's flash is written twice per cluster and never in a loop.
const (
	// nvMark is in the range for owners (TCG Registry of Reserved TPM 2.0
	// Handles and Localities, 0x01800000-0x01BFFFFF).
	nvMark = 0x01806D75
	// markSize is room for a length and MaxMark bytes. It is written at once,
	// which every TPM can: TPM_PT_NV_BUFFER_MAX is 512 at least.
	markSize = 1 + MaxMark
	// MaxMark is the longest mark, in bytes.
	MaxMark = 64
)

// ErrNoRoom says that the TPM has no free NV memory.
var ErrNoRoom = errors.New("tpm/device: the TPM has no room for a mark")

// errForeignMark says that something else is kept at our index.
var errForeignMark = errors.New("the NV index holds something that is no mark")

// Mark returns the mark, "" if there is none.
func (d *Device) Mark() (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := d.readMark()
	if err != nil {
		return "", fmt.Errorf("tpm/device: read mark: %w", explain(err))
	}
	return s, nil
}

// SetMark replaces the mark; "" removes it. An equal mark is not written
// again. An index that holds something else than a mark is left alone.
func (d *Device) SetMark(mark string) error {
	if len(mark) > MaxMark {
		return fmt.Errorf("tpm/device: set mark: %d bytes, at most %d", len(mark), MaxMark)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.setMark(mark); err != nil {
		if errors.Is(err, tpm2.TPMRCNVSpace) {
			return fmt.Errorf("%w: %w", ErrNoRoom, err)
		}
		return fmt.Errorf("tpm/device: set mark: %w", explain(err))
	}
	return nil
}

func (d *Device) setMark(mark string) error {
	old, err := d.readMark()
	if err != nil {
		return err
	}
	if old == mark {
		return nil
	}
	name, exists, err := d.markIndex()
	if err != nil {
		return err
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if mark == "" {
		_, err := tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: nvMark, Name: name}}.Execute(d.tpm)
		return err
	}
	if !exists {
		if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(markTemplate())}).Execute(d.tpm); err != nil {
			return err
		}
		if name, _, err = d.markIndex(); err != nil {
			return err
		}
	}
	b := make([]byte, markSize)
	b[0] = byte(len(mark))
	copy(b[1:], mark)
	_, err = tpm2.NVWrite{
		AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: nvMark, Name: name}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: b},
	}.Execute(d.tpm)
	return err
}

func markTemplate() tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: nvMark, NameAlg: tpm2.TPMAlgSHA256, DataSize: markSize,
		// NoDA: a wrong password elsewhere must not lock the mark.
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, WriteAll: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}
}

// markIndex returns the name of the index if it exists.
func (d *Device) markIndex() (tpm2.TPM2BName, bool, error) {
	list, err := d.handles(nvMark, 1)
	if err != nil {
		return tpm2.TPM2BName{}, false, err
	}
	if len(list) == 0 || list[0] != nvMark {
		return tpm2.TPM2BName{}, false, nil
	}
	rsp, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(nvMark)}.Execute(d.tpm)
	if err != nil {
		return tpm2.TPM2BName{}, false, err
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return tpm2.TPM2BName{}, false, err
	}
	if pub.DataSize != markSize || !pub.Attributes.OwnerWrite {
		return tpm2.TPM2BName{}, false, errForeignMark
	}
	return rsp.NVName, true, nil
}

func (d *Device) readMark() (string, error) {
	_, exists, err := d.markIndex()
	if err != nil || !exists {
		return "", err
	}
	b, err := d.nvReadAll(nvMark)
	if errors.Is(err, errUnusable) { // defined, and the power went before the write
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if len(b) != markSize || int(b[0]) > MaxMark {
		return "", errForeignMark
	}
	return string(b[1 : 1+b[0]]), nil
}
