package member

import (
	"fmt"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// LabelPrefix is before every label that the hardware gives a k3s node.
const LabelPrefix = "hardware.muster/"

// maxDeviceLabels bounds the labels of devices.
const maxDeviceLabels = 16

// HardwareLabels turns what a machine says of itself into labels of its k3s
// node, so that the site's scheduler can use them. The machine's words are
// claims: each is brought into the form of a label value or left out.
func HardwareLabels(h fleet.Hardware) map[string]string {
	out := map[string]string{}
	put := func(key, value string) {
		if v := labelValue(value); v != "" {
			out[LabelPrefix+key] = v
		}
	}
	put("vendor", h.Vendor)
	put("product", h.Product)
	if h.CPUs > 0 {
		put("cpus", fmt.Sprint(h.CPUs))
	}
	if gib := (h.MemoryBytes + 1<<29) >> 30; gib > 0 {
		put("memory-gib", fmt.Sprint(gib))
	}
	disk := ""
	for _, d := range h.Disks {
		switch {
		case d.Removable:
		case d.Transport == "nvme":
			disk = "nvme"
		case !d.Rotational && disk != "nvme":
			disk = "ssd"
		case disk == "":
			disk = "rotating"
		}
	}
	put("disk", disk)
	count := map[string]int{}
	vendor := map[string]string{}
	for _, d := range h.Devices {
		class := strings.ToLower(labelValue(d.Class))
		if class == "" || strings.Contains(class, ".") || len(count) == maxDeviceLabels && count[class] == 0 {
			continue
		}
		count[class]++
		vendor[class] = vendorName(d.Vendor)
	}
	for class, n := range count {
		put(class, fmt.Sprint(n))
		put(class+"-vendor", vendor[class])
	}
	return out
}

// vendorName is the everyday name behind a PCI vendor ID, for those that
// people select by.
func vendorName(id string) string {
	switch strings.ToLower(id) {
	case "10de":
		return "nvidia"
	case "1002":
		return "amd"
	case "8086":
		return "intel"
	}
	return id
}

// labelValue brings a text into the form of a label value: at most 63 letters,
// digits, '-', '_' and '.', a letter or digit at both ends.
func labelValue(s string) string {
	var b strings.Builder
	for _, r := range strings.TrimSpace(s) {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
			b.WriteRune(r)
		case r == ' ' || r == '\t':
			b.WriteByte('-')
		}
		if b.Len() == 63 {
			break
		}
	}
	return strings.Trim(b.String(), "-_.")
}
