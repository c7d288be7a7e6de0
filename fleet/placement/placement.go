// Package placement says where things go: which disk of a machine an
// installation takes, and which sites something is for. It decides from what
// it is given and touches nothing.
package placement

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// Choice is one disk, with the exact target that an order for it names.
type Choice struct {
	Disk   fleet.Disk
	Target fleet.DiskTarget
	// Why it was this one, in a sentence.
	Why string
}

// Fits reports whether labels hold all of a selector. An empty one fits all.
func Fits(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, there := labels[k]; !there || got != v {
			return false
		}
	}
	return true
}

// Find finds the disk that a person named: "serial=S", "wwn=W", or a path. The
// path is only how it was found: the order names what the disk says of itself.
func Find(selector string, overwrite bool, disks []fleet.Disk) (Choice, error) {
	key, value, split := strings.Cut(selector, "=")
	is := func(d fleet.Disk) bool {
		switch {
		case split && key == "serial":
			return d.Serial == value
		case split && key == "wwn":
			return d.WWN == value
		case !split && strings.HasPrefix(selector, "/"):
			return d.Path == selector
		}
		return false
	}
	if value == "" && !strings.HasPrefix(selector, "/") {
		return Choice{}, fmt.Errorf("placement: disk %.80q: want serial=S, wwn=W or a path such as /dev/nvme0n1", selector)
	}
	var found []fleet.Disk
	for _, d := range disks {
		if is(d) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 0:
		return Choice{}, fmt.Errorf("placement: no disk is %.80q; the machine reported: %s", selector, describe(disks))
	case 1:
	default:
		return Choice{}, fmt.Errorf("placement: %d disks are %.80q, and an order must name just one: %s; name it by wwn= or by its path", len(found), selector, describe(found))
	}
	if err := usable(found[0], overwrite, disks); err != nil {
		return Choice{}, err
	}
	return choice(found[0], "it was named as "+selector), nil
}

// Choose finds the disk that a rule takes.
func Choose(rule fleet.DiskRule, disks []fleet.Disk) (Choice, error) {
	if err := rule.Validate(); err != nil {
		return Choice{}, err
	}
	var (
		good []fleet.Disk
		why  []error
	)
	for _, d := range disks {
		err := suits(rule, d)
		if err == nil {
			err = usable(d, rule.Overwrite, disks)
		}
		if err != nil {
			why = append(why, err)
			continue
		}
		good = append(good, d)
	}
	if len(good) == 0 {
		if len(disks) == 0 {
			return Choice{}, errors.New("placement: the machine reported no disk")
		}
		var said []string
		for _, err := range why[:min(len(why), 8)] {
			said = append(said, strings.TrimPrefix(err.Error(), "placement: "))
		}
		return Choice{}, fmt.Errorf("placement: no disk suits the rule: %s", strings.Join(said, "; "))
	}
	if rule.Prefer == fleet.DiskOnly && len(good) > 1 {
		return Choice{}, fmt.Errorf("placement: the rule wants just one disk, and %d suit it: %s", len(good), describe(good))
	}
	// Equal disks are told apart by their path, so that the same machine gets
	// the same answer again; the order names the one by its serial number.
	slices.SortStableFunc(good, func(a, b fleet.Disk) int {
		if rule.Prefer == fleet.DiskNVMeFirst && nvme(a) != nvme(b) {
			if nvme(a) {
				return -1
			}
			return 1
		}
		if a.SizeBytes != b.SizeBytes {
			smaller := -1
			if a.SizeBytes > b.SizeBytes {
				smaller = 1
			}
			if rule.Prefer == fleet.DiskLargest {
				return -smaller
			}
			return smaller
		}
		return strings.Compare(a.Path, b.Path)
	})
	return choice(good[0], fmt.Sprintf("the rule takes the %s disk of %d that suit it", word(rule.Prefer), len(good))), nil
}

func word(prefer string) string {
	switch prefer {
	case fleet.DiskNVMeFirst:
		return "smallest NVMe"
	case fleet.DiskOnly:
		return "only"
	}
	return prefer
}

func nvme(d fleet.Disk) bool {
	return d.Transport == "nvme" || strings.HasPrefix(d.Path, "/dev/nvme")
}

func suits(rule fleet.DiskRule, d fleet.Disk) error {
	model, prefix := strings.CutSuffix(rule.Model, "*")
	switch {
	case rule.Model != "" && prefix && !strings.HasPrefix(d.Model, model), rule.Model != "" && !prefix && d.Model != rule.Model:
		return fmt.Errorf("%s is a %q, not a %q", d.Path, d.Model, rule.Model)
	case rule.Transport != "" && d.Transport != rule.Transport:
		return fmt.Errorf("%s is connected by %q, not by %q", d.Path, d.Transport, rule.Transport)
	case d.SizeBytes < rule.MinBytes:
		return fmt.Errorf("%s has %d bytes, fewer than %d", d.Path, d.SizeBytes, rule.MinBytes)
	case rule.MaxBytes > 0 && d.SizeBytes > rule.MaxBytes:
		return fmt.Errorf("%s has %d bytes, more than %d", d.Path, d.SizeBytes, rule.MaxBytes)
	}
	return nil
}

// usable says why nothing is ever installed on a disk, if so.
func usable(d fleet.Disk, overwrite bool, all []fleet.Disk) error {
	t := target(d)
	same := 0
	for _, o := range all {
		if t.Matches(o) {
			same++
		}
	}
	switch {
	case d.Removable:
		return fmt.Errorf("placement: %s is removable: it may be the stick that the machine started from", d.Path)
	case d.Serial == "" && d.WWN == "":
		return fmt.Errorf("placement: %s has neither a serial number nor a WWN, so that no order can name it exactly", d.Path)
	case d.SizeBytes <= 0:
		return fmt.Errorf("placement: the size of %s is not known", d.Path)
	case same != 1:
		return fmt.Errorf("placement: %d disks of the machine say the same of themselves (%s, serial %q), so that no order can name one exactly: take one out", same, d.Path, d.Serial+d.WWN)
	case d.Partitioned && !overwrite:
		return fmt.Errorf("placement: %s holds a partition table: what is on it would be lost (overwrite says that this is all right)", d.Path)
	}
	return nil
}

func target(d fleet.Disk) fleet.DiskTarget {
	return fleet.DiskTarget{Serial: d.Serial, WWN: d.WWN, Model: d.Model, SizeBytes: d.SizeBytes}
}

func choice(d fleet.Disk, why string) Choice { return Choice{d, target(d), why} }

func describe(disks []fleet.Disk) string {
	var out []string
	for _, d := range disks[:min(len(disks), 16)] {
		out = append(out, fmt.Sprintf("%s (%s, serial=%s, wwn=%s, %.1f GB)", d.Path, d.Model, d.Serial, d.WWN, float64(d.SizeBytes)/1e9))
	}
	if len(out) == 0 {
		return "none"
	}
	return strings.Join(out, ", ")
}
