package device

import (
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/muster-edge/muster/pki/tpm"
)

var (
	// ErrNoTPM says that there is no TPM at the path.
	ErrNoTPM = errors.New("tpm/device: no TPM")
	// ErrOwned says that a hierarchy has a password: the TPM must be cleared
	// in the firmware's setup before muster can use it.
	ErrOwned = errors.New("tpm/device: the TPM has an owner; clear it in the firmware setup")
)

// Device is an open TPM. Its methods may be called from several goroutines;
// the TPM does one thing at a time.
type Device struct {
	mu  sync.Mutex
	tpm transport.TPMCloser
	// managed is true behind a resource manager, which gives every client
	// its own view of transient objects.
	managed bool

	// Loaded keys; nil when not loaded. ek is flushed after use, since raw
	// TPMs have three slots.
	ak, ldevid *loaded
	// identity is the EK that Identity chose.
	identity *ekSource
	// nvBufferMax is TPM_PT_NV_BUFFER_MAX, 0 until asked.
	nvBufferMax int
}

// loaded is a key that sits in a transient slot.
type loaded struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	// raw is the TPMT_PUBLIC, public the key in it (nil for an EK).
	raw    []byte
	public *ecdsa.PublicKey
}

// Open opens the TPM at a device node (/dev/tpmrm0; never /dev/tpm0 while
// others use it) or at swtpm's unix socket. On a raw TPM, objects and
// sessions that a former user left behind are flushed.
func Open(path string) (*Device, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s is not there", ErrNoTPM, path)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm/device: open: %w", err)
	}
	var t transport.TPMCloser
	socket := fi.Mode()&os.ModeSocket != 0
	if socket {
		t, err = linuxudstpm.Open(path)
	} else {
		t, err = linuxtpm.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm/device: open: %w", err)
	}
	return OpenTransport(t, !socket && path != "/dev/tpm0")
}

// OpenTransport uses a TPM that is reached in another way. Managed says that
// a resource manager stands between. Close closes t.
func OpenTransport(t transport.TPMCloser, managed bool) (*Device, error) {
	d := &Device{tpm: t, managed: managed}
	if managed {
		return d, nil
	}
	if err := d.flushAll(); err != nil {
		_ = t.Close()
		return nil, fmt.Errorf("tpm/device: open: %w", err)
	}
	return d, nil
}

// Close flushes what this device loaded and closes it.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropKeys()
	if err := d.tpm.Close(); err != nil {
		return fmt.Errorf("tpm/device: close: %w", err)
	}
	return nil
}

// flushAll flushes every transient object and session of a raw TPM.
func (d *Device) flushAll() error {
	for _, kind := range []tpm2.TPMHT{tpm2.TPMHTTransient, tpm2.TPMHTHMACSession} {
		handles, err := d.handles(uint32(kind)<<24, 64)
		if err != nil {
			return err
		}
		for _, h := range handles {
			// Loaded sessions are listed with their type bits (Part 2 §7.4).
			_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(d.tpm)
		}
	}
	return nil
}

// handles lists handles from first on, of first's kind.
func (d *Device) handles(first uint32, most int) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: uint32(most)}.Execute(d.tpm)
	if err != nil {
		return nil, fmt.Errorf("list handles: %w", explain(err))
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, fmt.Errorf("list handles: %w", err)
	}
	if len(list.Handle) > most {
		return nil, errors.New("list handles: more than were asked for")
	}
	return list.Handle, nil
}

// dropKeys flushes and forgets the loaded keys.
func (d *Device) dropKeys() {
	for _, k := range []**loaded{&d.ak, &d.ldevid} {
		if *k != nil {
			d.flush(*k)
			*k = nil
		}
	}
}

// flush gives a slot back; after a context loss there is nothing to give.
func (d *Device) flush(k *loaded) {
	_, _ = tpm2.FlushContext{FlushHandle: k.handle}.Execute(d.tpm)
}

// create makes a primary key.
func (d *Device) create(hierarchy tpm2.TPMHandle, template tpm2.TPMTPublic) (*loaded, error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(d.tpm)
	if err != nil {
		return nil, explain(err)
	}
	k := &loaded{handle: rsp.ObjectHandle, name: rsp.Name, raw: rsp.OutPublic.Bytes()}
	key, err := tpm.ParsePublic(k.raw)
	if err != nil {
		d.flush(k)
		return nil, err
	}
	k.public, _ = key.Public.(*ecdsa.PublicKey)
	return k, nil
}

// loadAK and loadLDevID return the loaded key, making it first if needed.
func (d *Device) loadAK() (*loaded, error) {
	return d.load(&d.ak, "AK", tpm.AKTemplate(tpm.Generation))
}

func (d *Device) loadLDevID() (*loaded, error) {
	return d.load(&d.ldevid, "LDevID", tpm.LDevIDTemplate(tpm.Generation))
}

func (d *Device) load(slot **loaded, what string, template tpm2.TPMTPublic) (*loaded, error) {
	if *slot != nil {
		return *slot, nil
	}
	k, err := d.create(tpm2.TPMRHOwner, template)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", what, err)
	}
	*slot = k
	return k, nil
}

// auth names the key for a command, with its empty password.
func (k *loaded) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.handle, Name: k.name, Auth: tpm2.PasswordAuth(nil)}
}

// errWrongKey says that a handle led to another key than ours: somebody else
// uses the raw TPM, too.
var errWrongKey = errors.New("the TPM used another key")

// retry runs an operation on loaded keys, and once more with new ones when
// the TPM lost them (a reset, another user of a raw TPM) or has no free slot.
func (d *Device) retry(op func() error) error {
	err := op()
	if err == nil || !contextLost(err) {
		return err
	}
	d.dropKeys()
	if !d.managed && (errors.Is(err, tpm2.TPMRCObjectMemory) || errors.Is(err, tpm2.TPMRCSessionMemory)) {
		if err := d.flushAll(); err != nil {
			return err
		}
	}
	return op()
}

// contextLost tells whether the TPM does not know a handle any more: a
// warning TPM_RC_REFERENCE_Hx, or TPM_RC_HANDLE/VALUE about a handle (TPM 2.0
// Library Part 2 §6.6).
func contextLost(err error) bool {
	if errors.Is(err, errWrongKey) || errors.Is(err, tpm2.TPMRCObjectMemory) || errors.Is(err, tpm2.TPMRCSessionMemory) {
		return true
	}
	var rc tpm2.TPMRC
	if !errors.As(err, &rc) {
		return false
	}
	if rc >= tpm2.TPMRCReferenceH0 && rc < tpm2.TPMRCReferenceH0+7 {
		return true
	}
	// Format one with neither parameter (bit 6) nor session (bit 11) flag:
	// about a handle.
	if rc&0x80 != 0 && rc&0x40 == 0 && rc&0x800 == 0 {
		switch rc & 0xBF {
		case tpm2.TPMRCHandle & 0xBF, tpm2.TPMRCValue & 0xBF:
			return true
		}
	}
	return false
}

// explain turns "a hierarchy has a password" into ErrOwned.
func explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%w (%w)", ErrOwned, err)
	}
	return err
}

// Properties returns the TPM's own words for its maker, model and firmware
// version. They are claims, for display.
func (d *Device) Properties() (vendor, model, firmware string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	rsp, err := tpm2.GetCapability{
		Capability:    tpm2.TPMCapTPMProperties,
		Property:      uint32(tpm2.TPMPTManufacturer),
		PropertyCount: 8,
	}.Execute(d.tpm)
	if err != nil {
		return "", "", "", fmt.Errorf("tpm/device: read properties: %w", explain(err))
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return "", "", "", fmt.Errorf("tpm/device: read properties: %w", err)
	}
	var v1, v2 uint32
	for _, p := range list.TPMProperty {
		switch p.Property {
		case tpm2.TPMPTManufacturer:
			vendor = ascii(p.Value)
		case tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString1 + 1, tpm2.TPMPTVendorString1 + 2, tpm2.TPMPTVendorString1 + 3:
			model += ascii(p.Value)
		case tpm2.TPMPTFirmwareVersion1:
			v1 = p.Value
		case tpm2.TPMPTFirmwareVersion1 + 1:
			v2 = p.Value
		}
	}
	// Makers use the 64 bits as they like; four numbers is how most of them,
	// and the systems' tools, print it.
	firmware = fmt.Sprintf("%d.%d.%d.%d", v1>>16, v1&0xFFFF, v2>>16, v2&0xFFFF)
	return vendor, model, firmware, nil
}

// ascii reads four bytes of text, without what is not.
func ascii(v uint32) string {
	var out []byte
	for shift := 24; shift >= 0; shift -= 8 {
		if c := byte(v >> shift); c > ' ' && c <= '~' {
			out = append(out, c)
		}
	}
	return string(out)
}

// Signer returns the LDevID key. Its signatures are ECDSA over SHA-256 in
// ASN.1, what TLS 1.3 wants from a P-256 key.
func (d *Device) Signer() crypto.Signer { return &signer{d: d} }
