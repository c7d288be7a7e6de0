package pki_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

const goldenKernel = "5f21ff2c0d5d899842b28a8b19901ba72cf7a7ab93c02a77fadc6ff72be85b31"

// bootCase is a boot that a machine shows.
type bootCase struct {
	log  []pki.LogEvent
	pcrs map[int][]byte
	// images are those that the centre knows.
	images []fleet.Image
	err    error
}

// replayed sets the PCRs to what the log leads to: what a TPM says after a
// boot that did just that.
func (b *bootCase) replayed() {
	b.pcrs = map[int][]byte{}
	for i, v := range pki.Replay(b.log) {
		b.pcrs[i] = v[:]
	}
}

// insert puts an event before the first one that where accepts.
func (b *bootCase) insert(e pki.LogEvent, where func(pki.LogEvent) bool) {
	i := slices.IndexFunc(b.log, where)
	if i < 0 {
		panic("no such event")
	}
	b.log = slices.Insert(slices.Clone(b.log), i, e)
}

// change edits a copy of the first event that where accepts.
func (b *bootCase) change(where func(pki.LogEvent) bool, edit func(*pki.LogEvent)) {
	b.log = slices.Clone(b.log)
	i := slices.IndexFunc(b.log, where)
	if i < 0 {
		panic("no such event")
	}
	e := b.log[i]
	e.Data = bytes.Clone(e.Data)
	edit(&e)
	b.log[i] = e
}

func is(pcr int, kind uint32) func(pki.LogEvent) bool {
	return func(e pki.LogEvent) bool { return e.PCR == pcr && e.Type == kind }
}

func digestIs(hexDigest string) func(pki.LogEvent) bool {
	return func(e pki.LogEvent) bool { return bytes.Equal(e.Digest[:], unhex(hexDigest)) }
}

const (
	evSeparator   = 0x4
	evApplication = 0x80000003
	evDriver      = 0x80000004
	evAction      = 0x80000007
	evAuthority   = 0x800000E0
	evConfig      = 0x80000001
	evIPL         = 0xD
	evNoAction    = 0x3
)

func event(pcr int, kind uint32, data []byte) pki.LogEvent {
	return pki.LogEvent{PCR: pcr, Type: kind, Data: data, Digest: sha256.Sum256(data)}
}

// efiVariable writes UEFI_VARIABLE_DATA.
func efiVariable(guid []byte, name string, data []byte) []byte {
	u := utf16.Encode([]rune(name))
	b := bytes.Clone(guid)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(u)))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(data)))
	for _, c := range u {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return append(b, data...)
}

var (
	guidGlobal = unhex("61dfe48bca93d211aa0d00e098032b8c")
	guidDB     = unhex("cbb219d73a3d9645a3bcdad00e67656f")
)

func TestVerifyBoot(t *testing.T) {
	foreign := event(4, evApplication, []byte("some other program"))
	for _, c := range []struct {
		when string
		log  string
		edit func(*bootCase)
		want fleet.BootTrust
		// why is part of the finding that says why not more.
		why string
	}{
		{"when booted from disk without Secure Boot then measured", "disk", nil, fleet.BootMeasured, "Secure Boot off"},
		{"when booted by PXE without Secure Boot then measured", "pxe", nil, fleet.BootMeasured, "Secure Boot off"},
		{"when booted with Secure Boot under our key then enforced", "secureboot", nil, fleet.BootEnforced, ""},
		{"when an older image of ours failed before then measured", "disk", func(b *bootCase) {
			older := event(4, evApplication, []byte("our older image"))
			back := event(4, evAction, []byte("Returning from EFI Application from Boot Option"))
			b.images = append(b.images, fleet.Image{Name: "older", Version: "1", Authenticode: older.Digest[:]})
			b.insert(older, is(4, evApplication))
			b.insert(back, func(e pki.LogEvent) bool { return e.PCR == 4 && e.Type == evApplication && e.Digest != older.Digest })
			b.replayed()
		}, fleet.BootMeasured, ""},
		{"when the image's loader started it then measured", "disk", func(b *bootCase) {
			loader := event(4, evApplication, []byte("our loader"))
			b.images[0].Loader = loader.Digest[:]
			b.insert(loader, is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, ""},
		{"when another loader started it then unknown", "disk", func(b *bootCase) {
			b.images[0].Loader = foreign.Digest[:]
			b.insert(event(4, evApplication, []byte("a loader of somebody")), is(4, evApplication))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the loader ran between image and kernel then unknown", "disk", func(b *bootCase) {
			loader := event(4, evApplication, []byte("our loader"))
			b.images[0].Loader = loader.Digest[:]
			b.insert(loader, digestIs(goldenKernel))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},

		{"when the image is not registered then unknown", "disk", func(b *bootCase) { b.images = nil }, fleet.BootUnknown, "not ours"},
		{"when there is no log then unknown", "disk", func(b *bootCase) { b.log = nil }, fleet.BootUnknown, "no event log"},
		{"when the log is not readable then unknown", "disk", func(b *bootCase) {
			b.log, b.err = nil, errTest("bad\x1b[2Jlog")
		}, fleet.BootUnknown, "bad.[2Jlog"},
		{"when the log is another boot's then unknown", "disk", func(b *bootCase) {
			b.log = append(slices.Clone(b.log), event(4, evSeparator, []byte{0, 0, 0, 0}))
		}, fleet.BootUnknown, "does not replay to PCR 4"},
		{"when PCR 7 does not replay then unknown", "disk", func(b *bootCase) { b.pcrs[7][0] ^= 1 }, fleet.BootUnknown, "does not replay to PCR 7"},
		{"when PCR 11 does not replay then unknown", "disk", func(b *bootCase) { b.pcrs[11][0] ^= 1 }, fleet.BootUnknown, "does not replay to PCR 11"},
		{"when only PCR 0 and 2 do not replay then measured", "disk", func(b *bootCase) {
			b.pcrs[0][0] ^= 1
			b.pcrs[2][0] ^= 1
		}, fleet.BootMeasured, ""},
		{"when a foreign program ran before the image then unknown", "disk", func(b *bootCase) {
			b.insert(foreign, is(4, evApplication))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when a foreign program ran between image and kernel then unknown", "disk", func(b *bootCase) {
			b.insert(foreign, digestIs(goldenKernel))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the kernel was started twice then unknown", "disk", func(b *bootCase) {
			k := b.log[slices.IndexFunc(b.log, digestIs(goldenKernel))]
			b.insert(k, digestIs(goldenKernel))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the kernel was started without its image then unknown", "disk", func(b *bootCase) {
			b.log = slices.DeleteFunc(slices.Clone(b.log), func(e pki.LogEvent) bool {
				return bytes.Equal(e.Digest[:], goldenImage().Authenticode)
			})
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the kernel is another image's then unknown", "disk", func(b *bootCase) {
			b.images[0].Kernel = bytes.Repeat([]byte{7}, 32)
		}, fleet.BootUnknown, "not ours"},
		{"when the foreign program is typed as a separator then unknown", "disk", func(b *bootCase) {
			e := foreign
			e.Type, e.Data = evSeparator, []byte{0, 0, 0, 0}
			b.insert(e, is(4, evApplication))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the foreign program is typed as an action then unknown", "disk", func(b *bootCase) {
			e := foreign
			e.Type, e.Data = evAction, []byte("Calling EFI Application from Boot Option")
			b.insert(e, is(4, evApplication))
			b.replayed()
		}, fleet.BootUnknown, "not ours"},
		{"when the foreign program is hidden as not extended then unknown", "disk", func(b *bootCase) {
			b.insert(foreign, is(4, evApplication))
			b.replayed()
			b.change(digestIs(hexOf(foreign.Digest)), func(e *pki.LogEvent) { e.Type = evNoAction })
		}, fleet.BootUnknown, "does not replay to PCR 4"},
		{"when types of true events are changed then the same", "disk", func(b *bootCase) {
			b.log = slices.Clone(b.log)
			for i := range b.log {
				if b.log[i].Type != evNoAction {
					b.log[i].Type = 1 // EV_UNUSED
				}
			}
		}, fleet.BootMeasured, ""},
		{"when the image's digest is claimed in an entry that was not extended then unknown", "disk", func(b *bootCase) {
			b.change(is(4, evApplication), func(e *pki.LogEvent) { e.Digest = foreign.Digest })
			b.replayed()
			claim := pki.LogEvent{PCR: 4, Type: evNoAction}
			copy(claim.Digest[:], goldenImage().Authenticode)
			b.insert(claim, is(4, evApplication))
		}, fleet.BootUnknown, "not ours"},
		{"when only boot actions ran then unknown", "disk", func(b *bootCase) {
			b.log = slices.DeleteFunc(slices.Clone(b.log), is(4, evApplication))
			b.replayed()
		}, fleet.BootUnknown, "no registered image"},
		{"when PCR 11 is not the manifest's then unknown", "disk", func(b *bootCase) {
			b.log = append(slices.Clone(b.log), event(11, evIPL, []byte("more")))
			b.replayed()
		}, fleet.BootUnknown, "PCR 11 is not that"},
		{"when the image promises no PCR 11 then unknown", "disk", func(b *bootCase) { b.images[0].PCR11 = nil }, fleet.BootUnknown, "PCR 11 is not that"},
		{"when the command line came from outside then unknown", "disk", func(b *bootCase) {
			b.log = append(slices.Clone(b.log), event(12, evIPL, []byte("init=/bin/sh")))
			b.replayed()
		}, fleet.BootUnknown, "PCR 12"},
		{"when the firmware measured nothing then unknown", "disk", func(b *bootCase) {
			b.pcrs = map[int][]byte{}
		}, fleet.BootUnknown, "did not measure into PCR 0"},
		{"when PCR 0 alone is blank then unknown", "disk", func(b *bootCase) { b.pcrs[0] = make([]byte, 32) }, fleet.BootUnknown, "did not measure into PCR 0"},
		{"when PCR 2 is all ones then unknown", "disk", func(b *bootCase) { b.pcrs[2] = bytes.Repeat([]byte{0xff}, 32) }, fleet.BootUnknown, "did not measure into PCR 2"},
		{"when an operating system extended good values into blank PCRs then unknown", "disk", func(b *bootCase) {
			b.pcrs[0], b.pcrs[2] = make([]byte, 32), make([]byte, 32)
		}, fleet.BootUnknown, "did not measure"},
		{"when the log is endless then unknown", "disk", func(b *bootCase) {
			b.log = make([]pki.LogEvent, 20000)
		}, fleet.BootUnknown, "20000 events"},

		{"when the image is unsigned then measured", "secureboot", func(b *bootCase) { b.images[0].SignerCert = nil }, fleet.BootMeasured, "not signed"},
		{"when another certificate admitted the image then measured", "secureboot", func(b *bootCase) {
			b.images[0].SignerCert = bytes.Repeat([]byte{9}, 32)
		}, fleet.BootMeasured, "not ours"},
		{"when a second certificate admitted a program then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evAuthority, efiVariable(guidDB, "db", append(make([]byte, 16), "other certificate"...))), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "not ours"},
		{"when the data of the authority is changed then measured", "secureboot", func(b *bootCase) {
			b.change(is(7, evAuthority), func(e *pki.LogEvent) { e.Data[len(e.Data)-1] ^= 1 })
		}, fleet.BootMeasured, "does not explain"},
		{"when a driver was loaded before the image then measured and said", "disk", func(b *bootCase) {
			b.insert(event(2, evDriver, []byte("driver from a stick")), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "drivers: 1 option ROMs or drivers ran before the image"},
		{"when a driver is hidden as not extended then measured and said", "disk", func(b *bootCase) {
			b.insert(event(2, evDriver, []byte("driver from a stick")), is(4, evApplication))
			b.replayed()
			b.change(is(2, evDriver), func(e *pki.LogEvent) { e.Type = evNoAction })
		}, fleet.BootMeasured, "drivers: the log does not tell"},
		{"when Secure Boot was off and the data says on then measured", "disk", func(b *bootCase) {
			b.change(is(7, evConfig), func(e *pki.LogEvent) { e.Data[len(e.Data)-1] = 1 })
		}, fleet.BootMeasured, "does not explain"},
		{"when our certificate follows a vendor header then measured", "secureboot", func(b *bootCase) {
			// GHSA-9r4w-jg96-92mv: bytes before the certificate must not pass
			// for one, nor a certificate behind bytes.
			b.change(is(7, evAuthority), func(e *pki.LogEvent) {
				v := e.Data[36:]
				*e = event(7, evAuthority, efiVariable(guidDB, "db", append([]byte("vendor header 16"), v...)))
			})
			b.replayed()
		}, fleet.BootMeasured, "not ours"},
		{"when a program was admitted by MokList then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evAuthority, efiVariable(guidDB, "MokList", make([]byte, 40))), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "not by db"},
		{"when db has a foreign GUID then measured", "secureboot", func(b *bootCase) {
			b.change(is(7, evAuthority), func(e *pki.LogEvent) {
				d := bytes.Clone(e.Data)
				copy(d, guidGlobal)
				*e = event(7, evAuthority, d)
			})
			b.replayed()
		}, fleet.BootMeasured, "not by db"},
		{"when SecureBoot appears only after the separator then measured", "disk", func(b *bootCase) {
			b.insert(event(7, evConfig, efiVariable(guidGlobal, "SecureBoot", []byte{1})), is(4, evApplication))
			b.log = slices.DeleteFunc(b.log, func(e pki.LogEvent) bool {
				return e.PCR == 7 && e.Type == evConfig && e.Data[len(e.Data)-1] == 0
			})
			b.replayed()
		}, fleet.BootMeasured, ""},
		{"when SecureBoot is measured off, then on, then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evConfig, efiVariable(guidGlobal, "SecureBoot", []byte{0})), is(7, evConfig))
			b.replayed()
		}, fleet.BootMeasured, "Secure Boot off"},
		{"when SecureBoot is measured twice then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evConfig, efiVariable(guidGlobal, "SecureBoot", []byte{1})), is(7, evConfig))
			b.replayed()
		}, fleet.BootMeasured, "twice"},
		{"when SecureBoot has a foreign GUID then measured", "secureboot", func(b *bootCase) {
			b.change(is(7, evConfig), func(e *pki.LogEvent) { *e = event(7, evConfig, efiVariable(guidDB, "SecureBoot", []byte{1})) })
			b.replayed()
		}, fleet.BootMeasured, "foreign GUID"},
		{"when the firmware is in debug mode then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evAction, []byte("UEFI Debug Mode")), is(7, evConfig))
			b.replayed()
		}, fleet.BootMeasured, "does not explain"},
		{"when an unknown variable is measured then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evConfig, efiVariable(guidGlobal, "Surprise", nil)), is(7, evSeparator))
			b.replayed()
		}, fleet.BootMeasured, "unknown variable"},
		{"when audit mode is on then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evConfig, efiVariable(guidGlobal, "AuditMode", []byte{1})), is(7, evSeparator))
			b.replayed()
		}, fleet.BootMeasured, "audit mode"},
		{"when PCR 7 has two separators then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evSeparator, []byte{0, 0, 0, 0}), is(7, evConfig))
			b.replayed()
		}, fleet.BootMeasured, "admitted by"},
		{"when a separator follows the authority then measured", "secureboot", func(b *bootCase) {
			b.log = append(slices.Clone(b.log), event(7, evSeparator, []byte{0, 0, 0, 0}))
			b.replayed()
		}, fleet.BootMeasured, "two separators"},
		{"when the authority's entry is 10 bytes then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evAuthority, efiVariable(guidDB, "db", make([]byte, 10))), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "empty db entry"},
		{"when the authority's entry has an owner only then measured", "secureboot", func(b *bootCase) {
			b.insert(event(7, evAuthority, efiVariable(guidDB, "db", make([]byte, 16))), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "empty db entry"},
		{"when a variable's name is endless then measured", "secureboot", func(b *bootCase) {
			d := efiVariable(guidDB, "db", nil)
			binary.LittleEndian.PutUint64(d[16:], 1<<63)
			b.insert(event(7, evAuthority, d), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "does not explain"},
		{"when a variable's lengths wrap around then measured", "secureboot", func(b *bootCase) {
			d := efiVariable(guidDB, "db", nil)
			binary.LittleEndian.PutUint64(d[16:], 200)
			binary.LittleEndian.PutUint64(d[24:], 1<<64-1-395)
			b.insert(event(7, evAuthority, d), is(4, evApplication))
			b.replayed()
		}, fleet.BootMeasured, "does not explain"},
		{"when a variable is followed by bytes then measured", "secureboot", func(b *bootCase) {
			b.change(is(7, evAuthority), func(e *pki.LogEvent) { *e = event(7, evAuthority, append(e.Data, 0)) })
			b.replayed()
		}, fleet.BootMeasured, "does not explain"},
		{"when nothing was admitted then measured", "secureboot", func(b *bootCase) {
			b.log = slices.DeleteFunc(slices.Clone(b.log), is(7, evAuthority))
			b.replayed()
		}, fleet.BootMeasured, "no program was admitted"},
	} {
		t.Run(c.when, func(t *testing.T) {
			log, pcrs := golden(t, c.log)
			b := &bootCase{log: log, pcrs: clonePCRs(pcrs), images: []fleet.Image{goldenImage()}}
			if c.edit != nil {
				c.edit(b)
			}
			ev := newSoft().evidence(t, b.pcrs, b.log)
			ev.LogError = b.err
			v := verify(t, ev, pki.Policy{Images: b.images})
			if v.Boot != c.want {
				t.Errorf("boot is %v, want %v (%v)", v.Boot, c.want, v.Findings)
			}
			if (v.Image == "recovery@1.0.0") != (c.want != fleet.BootUnknown) {
				t.Errorf("image is %q", v.Image)
			}
			if !strings.Contains(failed(v), c.why) {
				t.Errorf("findings are %v, want one about %q", v.Findings, c.why)
			}
			if c.want == fleet.BootUnknown && len(v.Warnings) == 0 {
				t.Error("nobody is warned")
			}
		})
	}
}

// failed joins the findings that are not ok.
func failed(v pki.Verdict) string {
	var s []string
	for _, f := range v.Findings {
		if !f.OK {
			s = append(s, f.Check+": "+f.Detail)
		}
	}
	return strings.Join(s, "\n")
}

type errTest string

func (e errTest) Error() string { return string(e) }

func hexOf(d [32]byte) string { return fleet.HexBytes(d[:]).String() }

// TestGoldenLogsReplay holds Replay against what real TPMs said.
func TestGoldenLogsReplay(t *testing.T) {
	for _, name := range []string{"disk", "pxe", "secureboot"} {
		log, pcrs := golden(t, name)
		for i, v := range pki.Replay(log) {
			if i == 10 || i >= 17 && i <= 22 {
				continue // IMA; PCRs that start at ones
			}
			if !bytes.Equal(v[:], pcrs[i]) {
				t.Errorf("%s: PCR %d replays to %x, the TPM has %x", name, i, v, pcrs[i])
			}
		}
		log[3].Digest[0] ^= 1
		if v := pki.Replay(log)[log[3].PCR]; bytes.Equal(v[:], pcrs[log[3].PCR]) {
			t.Errorf("%s: a changed log replays", name)
		}
	}
}

func TestReplayStartupLocality(t *testing.T) {
	locality := pki.LogEvent{PCR: 0, Type: evNoAction, Data: []byte("StartupLocality\x00\x03")}
	crtm := event(0, 8, []byte("crtm"))
	start := make([]byte, 32)
	start[31] = 3
	want := sha256.Sum256(append(start, crtm.Digest[:]...))
	if got := pki.Replay([]pki.LogEvent{locality, crtm})[0]; got != want {
		t.Errorf("got %x, want %x", got, want)
	}
	if v, ok := pki.Replay([]pki.LogEvent{event(24, 1, nil), event(-1, 1, nil)})[24]; ok {
		t.Errorf("PCR 24 is %x", v)
	}
	zero := sha256.Sum256(append(make([]byte, 32), crtm.Digest[:]...))
	if got := pki.Replay([]pki.LogEvent{crtm, locality})[0]; got != zero {
		t.Error("a locality after the first measurement changed the value")
	}
}

// TestNoEditOfTheLogRaisesTrust: with PCRs of a foreign boot, nothing that a
// machine writes into its log makes the boot ours.
func TestNoEditOfTheLogRaisesTrust(t *testing.T) {
	log, _ := golden(t, "secureboot")
	b := &bootCase{log: log}
	b.insert(event(4, evApplication, []byte("bootkit")), is(4, evApplication))
	b.replayed()
	images := []fleet.Image{goldenImage()}
	rapid.Check(t, func(r *rapid.T) {
		edited := slices.Clone(b.log)
		for range rapid.IntRange(0, 6).Draw(r, "edits") {
			i := rapid.IntRange(0, len(edited)-1).Draw(r, "event")
			switch rapid.IntRange(0, 5).Draw(r, "edit") {
			case 0:
				edited = slices.Delete(edited, i, i+1)
			case 1:
				edited[i].Type = rapid.SampledFrom([]uint32{evNoAction, evSeparator, evAction, evApplication, 1}).Draw(r, "type")
			case 2:
				edited[i].PCR = rapid.IntRange(-1, 25).Draw(r, "pcr")
			case 3:
				edited[i].Digest = rapid.SampledFrom(log).Draw(r, "digest").Digest
			case 4:
				edited = slices.Insert(edited, i, rapid.SampledFrom(log).Draw(r, "insert"))
			case 5:
				edited[i].Data = rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(r, "data")
			}
			if len(edited) == 0 {
				break
			}
		}
		v := verify(t, newSoft().evidence(t, b.pcrs, edited), pki.Policy{Images: images})
		if v.Boot != fleet.BootUnknown {
			r.Fatalf("boot is %v with %d events", v.Boot, len(edited))
		}
	})
}

// TestBootOnATPM takes the whole way with a TPM that was extended as in the
// real boots.
func TestBootOnATPM(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	for _, c := range []struct {
		log  string
		want fleet.BootTrust
	}{{"pxe", fleet.BootMeasured}, {"secureboot", fleet.BootEnforced}} {
		t.Run(c.log, func(t *testing.T) {
			if err := m.swtpm.Restart(); err != nil {
				t.Fatal(err)
			}
			log, _ := golden(t, c.log)
			m.measure(t, log)
			m.read(t)
			ev := m.evidence(t)
			ev.Log = log
			pol := pki.Policy{Images: []fleet.Image{goldenImage()}, LabRoots: m.swtpm.CA.Roots()}
			if v := verify(t, ev, pol); v.Boot != c.want || v.Identity != fleet.IdentityLab {
				t.Errorf("got %v, %v (%v)", v.Identity, v.Boot, v.Findings)
			}
			// One more measurement by anybody and it is over.
			m.measure(t, []pki.LogEvent{event(4, evApplication, []byte("after"))})
			late := m.evidence(t)
			late.Log = log
			if v := verify(t, late, pol); v.Boot != fleet.BootUnknown {
				t.Errorf("after a late measurement: %v", v.Boot)
			}
		})
	}
	t.Run("when nothing was measured then unknown", func(t *testing.T) {
		if err := m.swtpm.Restart(); err != nil {
			t.Fatal(err)
		}
		m.read(t)
		ev := m.evidence(t)
		ev.Log, _ = golden(t, "pxe")
		if v := verify(t, ev, pki.Policy{Images: []fleet.Image{goldenImage()}}); v.Boot != fleet.BootUnknown {
			t.Errorf("boot is %v", v.Boot)
		}
	})
}
