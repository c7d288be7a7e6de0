package placement

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/fleettest"
)

const gb = 1_000_000_000

func machine() []fleet.Disk {
	return []fleet.Disk{
		{Path: "/dev/sda", Model: "Stick", Serial: "U1", SizeBytes: 8 * gb, Transport: "usb", Removable: true},
		{Path: "/dev/sdb", Model: "ST2000", Serial: "S2", WWN: "naa.2", SizeBytes: 2000 * gb, Transport: "sata", Rotational: true},
		{Path: "/dev/sdc", Model: "MX500", Serial: "S3", WWN: "naa.3", SizeBytes: 250 * gb, Transport: "sata"},
		{Path: "/dev/nvme0n1", Model: "PM9A3", Serial: "N1", SizeBytes: 960 * gb, Transport: "nvme"},
		{Path: "/dev/nvme1n1", Model: "PM9A3", Serial: "N2", SizeBytes: 960 * gb, Transport: "nvme", Partitioned: true},
		{Path: "/dev/vda", SizeBytes: 100 * gb},
	}
}

func TestChoose(t *testing.T) {
	for name, row := range map[string]struct {
		rule fleet.DiskRule
		want string // the path, or a part of the error
	}{
		"smallest":                 {fleet.DiskRule{Prefer: "smallest"}, "/dev/sdc"},
		"largest":                  {fleet.DiskRule{Prefer: "largest"}, "/dev/sdb"},
		"nvme first":               {fleet.DiskRule{Prefer: "nvme-first"}, "/dev/nvme0n1"},
		"nvme first, but too big":  {fleet.DiskRule{Prefer: "nvme-first", MaxBytes: 500 * gb}, "/dev/sdc"},
		"by model":                 {fleet.DiskRule{Prefer: "smallest", Model: "ST2000"}, "/dev/sdb"},
		"by part of a model":       {fleet.DiskRule{Prefer: "smallest", Model: "PM9*"}, "/dev/nvme0n1"},
		"by size":                  {fleet.DiskRule{Prefer: "smallest", MinBytes: 300 * gb}, "/dev/nvme0n1"},
		"by transport":             {fleet.DiskRule{Prefer: "largest", Transport: "nvme"}, "/dev/nvme0n1"},
		"equal ones by their path": {fleet.DiskRule{Prefer: "smallest", Transport: "nvme", Overwrite: true}, "/dev/nvme0n1"},
		"only, and there are more": {fleet.DiskRule{Prefer: "only"}, "3 suit it"},
		"only one":                 {fleet.DiskRule{Prefer: "only", Transport: "nvme"}, "/dev/nvme0n1"},
		"none of that model":       {fleet.DiskRule{Prefer: "smallest", Model: "none"}, "no disk suits"},
		"no such word":             {fleet.DiskRule{Prefer: "any"}, "prefer"},
	} {
		c, err := Choose(row.rule, machine())
		switch {
		case err == nil && (c.Disk.Path != row.want || c.Why == ""):
			t.Errorf("%s: %s because %s, want %s", name, c.Disk.Path, c.Why, row.want)
		case err != nil && !strings.Contains(err.Error(), row.want):
			t.Errorf("%s: %v, want %s", name, err, row.want)
		}
	}
	if _, err := Choose(fleet.DiskRule{Prefer: "only"}, nil); err == nil {
		t.Error("a machine without a disk has one")
	}
}

func TestFind(t *testing.T) {
	twins := append(machine(), fleet.Disk{Path: "/dev/sdx", Model: "MX500", Serial: "S3", WWN: "naa.3", SizeBytes: 250 * gb})
	cousins := append(machine(), fleet.Disk{Path: "/dev/sdx", Model: "MX500", Serial: "S3", WWN: "naa.9", SizeBytes: 250 * gb})
	for name, row := range map[string]struct {
		selector  string
		overwrite bool
		disks     []fleet.Disk
		want      string
	}{
		"by serial":           {"serial=S3", false, machine(), "/dev/sdc"},
		"by WWN":              {"wwn=naa.2", false, machine(), "/dev/sdb"},
		"by path":             {"/dev/nvme0n1", false, machine(), "/dev/nvme0n1"},
		"two with one serial": {"serial=S3", false, cousins, "/dev/sdc (MX500, serial=S3, wwn=naa.3"},
		"told apart by WWN":   {"wwn=naa.9", false, cousins, "/dev/sdx"},
		"twins in all":        {"/dev/sdc", false, twins, "say the same of themselves"},
		"a stick":             {"/dev/sda", true, machine(), "removable"},
		"a table":             {"serial=N2", false, machine(), "partition table"},
		"a table, and it may": {"serial=N2", true, machine(), "/dev/nvme1n1"},
		"nameless":            {"/dev/vda", true, machine(), "neither a serial"},
		"not there":           {"serial=X", false, machine(), "the machine reported"},
		"no selector":         {"", false, machine(), "want serial=S"},
		"an empty serial":     {"serial=", false, machine(), "want serial=S"},
		"another word":        {"model=MX500", false, machine(), "no disk is"},
	} {
		c, err := Find(row.selector, row.overwrite, row.disks)
		switch {
		case err == nil && c.Disk.Path != row.want:
			t.Errorf("%s: %s, want %s", name, c.Disk.Path, row.want)
		case err != nil && !strings.Contains(err.Error(), row.want):
			t.Errorf("%s: %v, want %s", name, err, row.want)
		}
	}
}

// Whatever machines report: what is chosen is exactly one of their disks, and
// never a removable one or, without leave, one that holds something.
func TestTargetsAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var disks []fleet.Disk
		for range rapid.IntRange(0, 5).Draw(t, "disks") {
			d := fleettest.Draw[fleet.Disk](t)
			d.Serial = rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "serial")
			d.SizeBytes = rapid.Int64Range(-1, 3).Draw(t, "size")
			disks = append(disks, d)
		}
		rule := fleet.DiskRule{Prefer: rapid.SampledFrom([]string{"only", "smallest", "largest", "nvme-first"}).Draw(t, "prefer"), Overwrite: rapid.Bool().Draw(t, "overwrite")}
		c, err := Choose(rule, disks)
		if err != nil {
			return
		}
		matching := 0
		for _, d := range disks {
			if c.Target.Matches(d) {
				matching++
			}
		}
		if matching != 1 || c.Disk.Removable || c.Disk.Partitioned && !rule.Overwrite {
			t.Fatalf("%+v of %+v", c, disks)
		}
	})
}
