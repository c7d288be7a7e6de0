package device

import (
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

const (
	nvFirst = 0x01C00000 // reserved for the platform and EKs
	nvChain = 0x01C00100 // 0x01C00100-0x01C001FF: EK certificate chain
	nvEnd   = 0x01C00200

	maxNVIndices = 254
	maxNV        = 16 * 1024 // of one index; certificates have 1-2 KiB
	maxChain     = 32 * 1024 // of all chain indices together
	maxChainLen  = 8
)

// nvIndices returns the NV indices of the EK range that exist.
func (d *Device) nvIndices() (map[uint32]bool, error) {
	list, err := d.handles(nvFirst, maxNVIndices)
	if err != nil {
		return nil, err
	}
	out := map[uint32]bool{}
	for _, h := range list {
		if h >= nvFirst && h < nvEnd {
			out[uint32(h)] = true
		}
	}
	return out, nil
}

// nvRead reads a whole NV index in chunks of what the TPM allows.
func (d *Device) nvRead(index uint32) ([]byte, error) {
	b, err := d.nvReadAll(index)
	if err != nil {
		return nil, fmt.Errorf("read NV 0x%08x: %w", index, explain(err))
	}
	return b, nil
}

func (d *Device) nvReadAll(index uint32) ([]byte, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(d.tpm)
	if err != nil {
		return nil, err
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	size := int(pub.DataSize)
	if size > maxNV {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errUnusable, size, maxNV)
	}
	if !pub.Attributes.Written {
		return nil, fmt.Errorf("%w: was never written", errUnusable)
	}
	handle := tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: rsp.NVName}
	var auth tpm2.AuthHandle
	switch {
	case pub.Attributes.AuthRead:
		auth = tpm2.AuthHandle{Handle: handle.Handle, Name: handle.Name, Auth: tpm2.PasswordAuth(nil)}
	case pub.Attributes.OwnerRead:
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	default:
		return nil, fmt.Errorf("%w: may not be read by us", errUnusable)
	}
	chunk, err := d.nvChunk()
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, size)
	for len(out) < size {
		part, err := tpm2.NVRead{
			AuthHandle: auth,
			NVIndex:    handle,
			Size:       uint16(min(chunk, size-len(out))),
			Offset:     uint16(len(out)),
		}.Execute(d.tpm)
		if err != nil {
			return nil, err
		}
		if len(part.Data.Buffer) == 0 || len(part.Data.Buffer) > size-len(out) {
			return nil, fmt.Errorf("the TPM answered with %d bytes", len(part.Data.Buffer))
		}
		out = append(out, part.Data.Buffer...)
	}
	return out, nil
}

// nvChunk returns TPM_PT_NV_BUFFER_MAX, asked once; 512 works everywhere.
func (d *Device) nvChunk() (int, error) {
	if d.nvBufferMax > 0 {
		return d.nvBufferMax, nil
	}
	rsp, err := tpm2.GetCapability{
		Capability:    tpm2.TPMCapTPMProperties,
		Property:      uint32(tpm2.TPMPTNVBufferMax),
		PropertyCount: 1,
	}.Execute(d.tpm)
	if err != nil {
		return 0, err
	}
	d.nvBufferMax = 512
	if list, err := rsp.CapabilityData.Data.TPMProperties(); err == nil {
		for _, p := range list.TPMProperty {
			if p.Property == tpm2.TPMPTNVBufferMax && p.Value >= 64 && p.Value <= 4096 {
				d.nvBufferMax = int(p.Value)
			}
		}
	}
	return d.nvBufferMax, nil
}

// readChain reads the intermediate certificates. Makers put certificates one
// after the other and cut the whole into indices, so the indices are joined
// and the DER is cut apart again.
func (d *Device) readChain(present map[uint32]bool) ([][]byte, error) {
	var all []byte
	for i := uint32(nvChain); i < nvEnd && present[i]; i++ {
		b, err := d.nvRead(i)
		if err != nil {
			return splitDER(all), err
		}
		if all = append(all, b...); len(all) > maxChain {
			return nil, fmt.Errorf("EK certificate chain is over %d bytes", maxChain)
		}
	}
	return splitDER(all), nil
}

// splitDER cuts ASN.1 SEQUENCEs with two- or three-octet lengths apart and
// stops at anything else, such as padding.
func splitDER(b []byte) [][]byte {
	var out [][]byte
	for len(out) < maxChainLen && len(b) > 4 && b[0] == 0x30 {
		var n int
		switch b[1] {
		case 0x81:
			n = 3 + int(b[2])
		case 0x82:
			n = 4 + int(binary.BigEndian.Uint16(b[2:]))
		default:
			return out
		}
		if n > len(b) {
			return out
		}
		out, b = append(out, b[:n:n]), b[n:]
	}
	return out
}
