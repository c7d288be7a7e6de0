package pki_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
)

// slotImage is what the golden log "slot" booted: systemd-boot 257.13 from the
// disk, the UKI in EFI/Linux, slot A, in OVMF with swtpm.
func slotImage() fleet.Image {
	return fleet.Image{
		Name: "edge", Version: "1.0", Kind: fleet.ImageSlot,
		Authenticode: unhex("fa4a7ea7a94f710a8b28d1a7c76c567a5f987996a6350e382826fb3534876fb0"),
		Kernel:       unhex("5f21ff2c0d5d899842b28a8b19901ba72cf7a7ab93c02a77fadc6ff72be85b31"),
		Loader:       unhex("937f1f3b0b3fed2034f1fddcc68c835f3e4ba190143f79693816e5a9d1718da5"),
		PCR11:        unhex("88f2346f2dbb2e76f2e7181f737b22f9c8214edd9722f53c852d3374f2ccb7e7"),
	}
}

// TestVerifySlotBoot: a system that a boot loader started from the disk is
// measured, and nothing but the very image of the manifest is.
func TestVerifySlotBoot(t *testing.T) {
	for _, c := range []struct {
		when string
		edit func(*fleet.Image)
		log  func(*bootCase)
		want fleet.BootTrust
		why  string
	}{
		{"when a slot booted from disk then measured", nil, nil, fleet.BootMeasured, "not signed"},
		{"when the UKI was altered then unknown", func(i *fleet.Image) { i.Authenticode[0] ^= 1 }, nil, fleet.BootUnknown, "not ours"},
		{"when the loader is another then unknown", func(i *fleet.Image) { i.Loader[0] ^= 1 }, nil, fleet.BootUnknown, "not ours"},
		{"when the manifest names no loader then unknown", func(i *fleet.Image) { i.Loader = nil }, nil, fleet.BootUnknown, "not ours"},
		{"when the kernel is another then unknown", func(i *fleet.Image) { i.Kernel[0] ^= 1 }, nil, fleet.BootUnknown, "not ours"},
		{"when a section is another then unknown", func(i *fleet.Image) { i.PCR11[0] ^= 1 }, nil, fleet.BootUnknown, "PCR 11"},
		{"when the loader passed options then unknown", nil, func(b *bootCase) { b.pcrs[12] = slices.Repeat([]byte{7}, 32) }, fleet.BootUnknown, "PCR 12"},
		{"when something extended PCR 11 later then unknown", nil, func(b *bootCase) {
			b.log = append(slices.Clone(b.log), event(11, evIPL, []byte("enter-initrd")))
			b.replayed()
		}, fleet.BootUnknown, "PCR 11"},
	} {
		t.Run(c.when, func(t *testing.T) {
			log, pcrs := golden(t, "slot")
			image := slotImage()
			if c.edit != nil {
				c.edit(&image)
			}
			b := &bootCase{log: log, pcrs: clonePCRs(pcrs), images: []fleet.Image{image}}
			if c.log != nil {
				c.log(b)
			}
			v := verify(t, newSoft().evidence(t, b.pcrs, b.log), pki.Policy{Images: b.images})
			if v.Boot != c.want || (v.Image == "edge@1.0") != (c.want == fleet.BootMeasured) {
				t.Errorf("boot is %v (%q), want %v (%v)", v.Boot, v.Image, c.want, v.Findings)
			}
			if !strings.Contains(failed(v), c.why) {
				t.Errorf("findings are %v, want one about %q", v.Findings, c.why)
			}
		})
	}
}
