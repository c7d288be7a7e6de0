package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"testing"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// measurement is one thing that firmware or stub extends.
type measurement struct {
	pcr  int
	kind uint32
	data []byte
	// digest is SHA-256 of data unless it is set.
	digest [32]byte
}

func (m measurement) sum() [32]byte {
	if m.digest != ([32]byte{}) {
		return m.digest
	}
	return sha256.Sum256(m.data)
}

const (
	evSeparator   = 0x4
	evCRTMVersion = 0x8
	evIPL         = 0xd
	evApplication = 0x80000003
	evAction      = 0x80000007
)

// operatingSystem is an image by what it leaves in the TPM.
type operatingSystem string

func (o operatingSystem) authenticode() [32]byte { return sha256.Sum256([]byte(o + " file")) }

// boot lists what a machine measures that boots o.
func (o operatingSystem) boot() []measurement {
	separator := []byte{0, 0, 0, 0}
	return []measurement{
		{pcr: 0, kind: evCRTMVersion, data: []byte("firmware 1")},
		{pcr: 2, kind: evSeparator, data: separator},
		{pcr: 7, kind: evSeparator, data: separator},
		{pcr: 4, kind: evAction, data: []byte("Calling EFI Application from Boot Option")},
		{pcr: 4, kind: evSeparator, data: separator},
		{pcr: 4, kind: evApplication, data: []byte("a path"), digest: o.authenticode()},
		{pcr: 11, kind: evIPL, data: []byte(o + " sections")},
	}
}

// image is what a charter says of o.
func (o operatingSystem) image() fleet.ImageEvidence {
	a := o.authenticode()
	pcr11 := pki.Replay(eventsOf(o.boot()))[11]
	return fleet.ImageEvidence{Name: "slot", Version: "1.0.0", Authenticode: a[:], PCR11: pcr11[:]}
}

func eventsOf(list []measurement) (out []pki.LogEvent) {
	for _, m := range list {
		out = append(out, pki.LogEvent{PCR: m.pcr, Type: m.kind, Digest: m.sum(), Data: m.data})
	}
	return out
}

// encodeLog writes a crypto-agile event log with the SHA-256 bank.
func encodeLog(list []measurement) []byte {
	var b bytes.Buffer
	le := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a Buffer does not fail
	spec := []byte("Spec ID Event03\x00\x00\x00\x00\x00\x00\x02\x00\x02\x01\x00\x00\x00\x0b\x00\x20\x00\x00")
	le([]uint32{0, 3})
	b.Write(make([]byte, 20))
	le(uint32(len(spec)))
	b.Write(spec)
	for _, m := range list {
		d := m.sum()
		le([]uint32{uint32(m.pcr), m.kind, 1})
		le(uint16(0x000b))
		b.Write(d[:])
		le(uint32(len(m.data)))
		b.Write(m.data)
	}
	return b.Bytes()
}

// machine is a node with a TPM that booted something.
type machine struct {
	*node
	swtpm  *swtpmtest.TPM
	device *device.Device
}

// newMachine switches a machine on that boots list.
func newMachine(t *testing.T, s *site, list []measurement) *machine {
	t.Helper()
	m := &machine{swtpm: swtpmtest.Start(t, swtpmtest.Options{}), node: &node{t: t}}
	m.boot(list)
	id, err := m.device.Identity(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := fleet.HashEK(key.Public)
	if err != nil {
		t.Fatal(err)
	}
	m.id = ek.NodeID()
	m.init(s)
	t.Cleanup(func() { _ = m.device.Close() })
	return m
}

// boot measures list into a TPM that was just reset.
func (m *machine) boot(list []measurement) {
	m.t.Helper()
	for _, e := range list {
		if err := m.swtpm.Extend(e.pcr, e.sum()); err != nil {
			m.t.Fatal(err)
		}
	}
	d, err := device.Open(m.swtpm.Path())
	if err != nil {
		m.t.Fatal(err)
	}
	m.device, m.tpm, m.signer = d, d, d.Signer()
	m.log = func() ([]byte, error) { return encodeLog(list), nil }
}

// reboot cuts power and boots something else.
func (m *machine) reboot(list []measurement) {
	m.t.Helper()
	if err := m.device.Close(); err != nil {
		m.t.Fatal(err)
	}
	if err := m.swtpm.Restart(); err != nil {
		m.t.Fatal(err)
	}
	m.boot(list)
}
