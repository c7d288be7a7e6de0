package firmware

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestLayoutIsThis(t *testing.T) {
	got, err := Layout(16_000_000_000, 512)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, p := range got {
		b.WriteString(strings.Join([]string{p.Label, p.Type}, " "))
		b.WriteByte(' ')
		for _, n := range []int64{p.Start >> 20, p.Size >> 20} {
			b.WriteString(" ")
			b.WriteString(itoa(n))
		}
		b.WriteByte('\n')
	}
	// Disks in the field look like this: a change makes them foreign.
	want := `ESP c12a7328-f81f-11d2-ba4b-00a0c93ec93b  1 1024
root-a 4f68bce3-e8cd-4db1-96e7-fbcaf984b709  1025 2048
root-a-verity 2c7357ed-ebd2-46d9-aec1-23d437ec2bf5  3073 64
root-b 4f68bce3-e8cd-4db1-96e7-fbcaf984b709  3137 2048
root-b-verity 2c7357ed-ebd2-46d9-aec1-23d437ec2bf5  5185 64
meta 0fc63daf-8483-4772-8e79-3d69d8477de4  5249 64
data 0fc63daf-8483-4772-8e79-3d69d8477de4  5313 9944
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	for _, p := range got {
		root := strings.HasPrefix(p.Label, "root-")
		if root != (p.Attributes&AttrReadOnly != 0) || (p.Label == LabelESP) == (p.Attributes&AttrNoAuto != 0) {
			t.Errorf("%s has the attributes %#x", p.Label, p.Attributes)
		}
	}
}

func itoa(n int64) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

// Partitions never overlap, and both GPTs have room.
func TestLayoutFits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(MinDisk, 64<<40).Draw(t, "size")
		sector := rapid.SampledFrom([]int64{512, 4096}).Draw(t, "sector")
		parts, err := Layout(size, sector)
		if err != nil {
			t.Fatal(err)
		}
		at := 2*sector + 16<<10
		for i, p := range parts {
			if p.Number != i+1 || p.Start < at || p.Size <= 0 || p.Start%PartitionAlign != 0 || p.Size%PartitionAlign != 0 {
				t.Fatalf("partition %+v after %d", p, at)
			}
			at = p.Start + p.Size
		}
		if at > size-sector-16<<10 {
			t.Fatalf("the last partition ends at %d of %d", at, size)
		}
		if last := parts[len(parts)-1]; last.Label != LabelData || last.Size < MinData {
			t.Fatalf("data is %+v", last)
		}
		if err := CheckLayout(parts, size, sector); err != nil {
			t.Fatal(err)
		}
		i := rapid.IntRange(0, len(parts)-1).Draw(t, "changed")
		parts[i].Start += PartitionAlign
		if CheckLayout(parts, size, sector) == nil {
			t.Fatalf("a moved %s is not seen", parts[i].Label)
		}
	})
}

func TestLayoutRefuses(t *testing.T) {
	for when, c := range map[string]struct {
		arch         string
		size, sector int64
	}{
		"the disk is a byte too small":  {"amd64", MinDisk - 1, 512},
		"the disk is empty":             {"amd64", 0, 512},
		"the size is negative":          {"amd64", math.MinInt64, 512},
		"the sectors are of 520 bytes":  {"amd64", 1 << 40, 520},
		"the sectors are of 0 bytes":    {"amd64", 1 << 40, 0},
		"the architecture is not known": {"riscv64", 1 << 40, 512},
	} {
		if _, err := LayoutFor(c.arch, c.size, c.sector); err == nil {
			t.Errorf("when %s, then there is a layout", when)
		}
	}
	// A disk that was cloned onto a larger one keeps its data partition.
	parts, err := Layout(MinDisk, 512)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckLayout(parts, 4*MinDisk, 512); err != nil {
		t.Errorf("a disk that grew: %v", err)
	}
	if err := CheckLayout(parts[:6], MinDisk, 512); err == nil {
		t.Error("a disk without data is taken")
	}
}
