package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	backendfile "github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"github.com/diskfs/go-diskfs/partition/gpt"
	"pgregory.net/rapid"

	"github.com/muster-edge/muster/firmware"
)

var mediaDate = time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600))

// noise is a file in which no two sectors are alike.
func noise(size int) []byte {
	b := make([]byte, size)
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(i)*0x9e3779b97f4a7c15+1)
	}
	return b
}

func mustMedium(t *testing.T, format string, efi []byte) []byte {
	t.Helper()
	b, err := makeMedium(format, efi, mediaDate)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// onDisk opens bytes the way the library wants them.
func onDisk(t *testing.T, b []byte) backend.Storage {
	t.Helper()
	path := filepath.Join(t.TempDir(), "medium")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return backendfile.New(f, true)
}

// Another program's readers find the image in every form of a medium.
func TestMediaAreReadByAnother(t *testing.T) {
	for _, size := range []int{1, sectorSize, 19<<20 + 77, 60 << 20} {
		efi := noise(size)
		for _, format := range []string{FormatDisk, FormatISO} {
			b := mustMedium(t, format, efi)
			disk := onDisk(t, b)
			table, err := gpt.Read(disk, sectorSize, sectorSize)
			if err != nil {
				t.Fatal(err)
			}
			if err := table.Verify(disk, uint64(len(b))); err != nil {
				t.Errorf("%s of %d bytes: the GPT: %v", format, size, err)
			}
			if n := len(table.Partitions); n != 1 || table.Partitions[0].Type != gpt.EFISystemPartition {
				t.Fatalf("%s: %d partitions, %+v", format, n, table.Partitions[0])
			}
			p := table.Partitions[0]
			esp, err := fat32.Read(disk, int64(p.Size), int64(p.Start)*sectorSize, sectorSize)
			if err != nil {
				t.Fatal(err)
			}
			got, err := fs.ReadFile(esp, "EFI/BOOT/BOOTX64.EFI")
			if err != nil || !bytes.Equal(got, efi) {
				t.Errorf("%s of %d bytes: the ESP gives %d other bytes, %v", format, size, len(got), err)
			}

			iso, err := iso9660.Read(disk, int64(len(b)), 0, isoBlock)
			if format == FormatDisk {
				if err == nil {
					t.Error("a plain disk is read as an ISO")
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			f, err := iso.OpenFile("/EFI/BOOT/BOOTX64.EFI", os.O_RDONLY)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, efi) {
				t.Errorf("ISO of %d bytes: the tree gives %d other bytes, %v", size, len(got), err)
			}
		}
	}
}

// The ISO is the disk plus blocks in the gap: what boots is the same.
func TestISOIsTheDiskWithMore(t *testing.T) {
	efi := noise(3 << 20)
	disk, iso := mustMedium(t, FormatDisk, efi), mustMedium(t, FormatISO, efi)
	if len(disk) != len(iso) || len(iso)%isoBlock != 0 {
		t.Fatalf("%d and %d bytes", len(disk), len(iso))
	}
	for i := range iso {
		if iso[i] != disk[i] && (i < 16*isoBlock || i >= (blockBOOT+1)*isoBlock) {
			t.Fatalf("they differ at %d, outside of the ISO's structures", i)
		}
	}
	if used := (2 + 128*128/sectorSize) * sectorSize; used > 16*isoBlock || (blockBOOT+1)*isoBlock > espStart*sectorSize {
		t.Errorf("GPT of %d bytes, ISO structures and ESP overlap", used)
	}
	// The catalog as firmware reads it (UEFI 2.10, section 13.3.2.1).
	le := binary.LittleEndian
	record := iso[blockBoot*isoBlock:]
	if string(record[1:6]) != "CD001" || string(record[7:30]) != "EL TORITO SPECIFICATION" {
		t.Errorf("boot record %q", record[:40])
	}
	catalog := iso[le.Uint32(record[71:])*isoBlock:][:64]
	var sum uint16
	for i := 0; i < 32; i += 2 {
		sum += le.Uint16(catalog[i:])
	}
	if sum != 0 || catalog[1] != 0xef || catalog[32] != 0x88 {
		t.Errorf("boot catalog % x, sum %d", catalog, sum)
	}
	if at := int(le.Uint32(catalog[40:])) * isoBlock; at != espStart*sectorSize || string(iso[at+82:at+87]) != "FAT32" {
		t.Errorf("the catalog leads to %d, where no FAT32 is", at)
	}
	for _, b := range [][]byte{disk, iso} {
		if notice := biosNotice(); len(notice) > 440 || !bytes.HasPrefix(b, notice) || b[510] != 0x55 || b[511] != 0xaa {
			t.Errorf("the first sector is not notice and protective MBR (%d bytes of notice)", len(notice))
		}
	}
	if text := bytes.Index(biosNotice(), []byte("\r\nmuster")); text != 0x19 {
		t.Errorf("the notice's code points at 0x19, its text is at %#x", text)
	}
}

func TestMediaDependOnTheImageAlone(t *testing.T) {
	efi := noise(100_000)
	for _, format := range []string{FormatDisk, FormatISO} {
		one := mustMedium(t, format, efi)
		t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
		t.Setenv("TZ", "Pacific/Kiritimati")
		if !bytes.Equal(one, mustMedium(t, format, efi)) {
			t.Errorf("%s: the same image gave other bytes", format)
		}
		other := bytes.Clone(efi)
		other[50_000] ^= 1
		two := mustMedium(t, format, other)
		for name, at := range map[string][2]int{
			"disk GUID": {sectorSize + 56, 16}, "partition GUID": {2*sectorSize + 16, 16}, "volume serial": {espStart*sectorSize + 67, 4},
		} {
			if bytes.Equal(one[at[0]:at[0]+at[1]], two[at[0]:at[0]+at[1]]) {
				t.Errorf("%s: two images have the same %s", format, name)
			}
		}
		later, err := makeMedium(format, efi, mediaDate.Add(time.Hour))
		if err != nil || bytes.Equal(one, later) {
			t.Errorf("%s: the date is in no directory (%v)", format, err)
		}
	}
	id := firmware.MediumOf(firmware.Digest{1})
	if id.Disk == id.Partition || id.Disk.String()[14] != '8' || id.Partition.String()[14] != '8' {
		t.Errorf("%+v", id)
	}
}

func TestMediaRefuse(t *testing.T) {
	for when, c := range map[string]struct {
		format string
		efi    []byte
	}{
		"the image is empty":     {FormatDisk, nil},
		"the image is huge":      {FormatDisk, make([]byte, maxMedium+1)},
		"the format is unknown":  {"qcow2", []byte("x")},
		"the UKI is no medium":   {FormatUKI, []byte("x")},
		"the format is no word":  {"", []byte("x")},
		"the format is shouting": {"ISO", []byte("x")},
	} {
		if _, err := makeMedium(c.format, c.efi, mediaDate); err == nil {
			t.Errorf("when %s, then a medium is made", when)
		}
	}
	if _, err := checkFormats([]string{"uki", "vhd", "floppy"}); err == nil || !strings.Contains(err.Error(), "vhd") || !strings.Contains(err.Error(), "floppy") {
		t.Errorf("want all unknown formats named, got %v", err)
	}
	if m, err := checkFormats([]string{"iso", "uki", "disk", "iso"}); err != nil || fmt.Sprint(m) != "[disk iso]" {
		t.Errorf("%v, %v", m, err)
	}
	for in, want := range map[time.Time]string{
		time.Unix(0, 0): "1980-01-01T00:00:00Z", time.Date(3000, 1, 1, 0, 0, 0, 0, time.UTC): "2107-12-31T23:59:58Z", mediaDate: "2026-03-04T04:06:06Z",
	} {
		if got := mediumDate(in).Format(time.RFC3339); got != want {
			t.Errorf("%v becomes %s, want %s", in, got, want)
		}
	}
}

// Whatever the size, the FAT is one: 32 bits wide by its number of clusters,
// large enough for them, and the file aligned to an ISO's blocks.
func TestFATLayout(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, maxMedium).Draw(t, "size")
		l := newFATLayout(size)
		switch {
		case l.clusters() < 65525:
			t.Fatalf("%d clusters are a FAT16", l.clusters())
		case l.perFAT*128 < l.clusters()+2:
			t.Fatalf("a FAT of %d sectors is too small for %d clusters", l.perFAT, l.clusters())
		case fileCluster+l.file > rootCluster+l.clusters():
			t.Fatalf("the file ends at cluster %d, the last is %d", fileCluster+l.file, l.clusters()+1)
		case l.file*sectorSize < size:
			t.Fatalf("%d clusters for %d bytes", l.file, size)
		case (espStart+l.fileSector())*sectorSize%isoBlock != 0:
			t.Fatalf("the file starts at sector %d", l.fileSector())
		case l.reserved < 32 || l.reserved > 0xffff || l.total%alignment != 0:
			t.Fatalf("%+v", l)
		}
	})
}

// The programs that people repair disks with have nothing to repair.
func TestMediaPassTheCheckers(t *testing.T) {
	dir := t.TempDir()
	put := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	efi := noise(19<<20 + 5)
	disk, iso := mustMedium(t, FormatDisk, efi), mustMedium(t, FormatISO, efi)
	esp := disk[espStart*sectorSize:][:newFATLayout(len(efi)).total*sectorSize]
	lost := bytes.Clone(esp)
	l := newFATLayout(len(efi))
	for n := range fatCount { // the chain breaks in both copies
		binary.LittleEndian.PutUint32(lost[(l.reserved+n*l.perFAT)*sectorSize+4*(fileCluster+9):], 0)
	}
	badGPT := bytes.Clone(disk)
	badGPT[2*sectorSize+60] ^= 1
	for _, c := range []struct {
		name string
		good string
		bad  string
		says string // by a bad file, if the exit code does not
		args func(string) []string
	}{
		{"fsck.fat", put("esp", esp), put("lost", lost), "", func(p string) []string { return []string{"-n", "-v", p} }},
		{"mdir", put("esp", esp), put("zero", make([]byte, len(esp))), "", func(p string) []string { return []string{"-i", p, "::/EFI/BOOT/BOOTX64.EFI"} }},
		{"sgdisk", put("disk", disk), put("badgpt", badGPT), "CRC", func(p string) []string { return []string{"-v", p} }},
		{"sgdisk", put("iso", iso), put("badgpt", badGPT), "CRC", func(p string) []string { return []string{"-v", p} }},
		{"xorriso", put("iso", iso), put("disk", disk), "Not found", func(p string) []string { return []string{"-indev", p, "-lsl", "/EFI/BOOT/BOOTX64.EFI"} }},
	} {
		tool, err := exec.LookPath(c.name)
		if errors.Is(err, exec.ErrNotFound) {
			if _, err := os.Stat("/usr/sbin/" + c.name); err != nil {
				t.Logf("NOT checked with %s: it is not here", c.name)
				continue
			}
			tool = "/usr/sbin/" + c.name
		}
		if out, err := exec.Command(tool, c.args(c.good)...).CombinedOutput(); err != nil || c.says != "" && strings.Contains(string(out), c.says) {
			t.Errorf("%s on %s: %v\n%s", c.name, filepath.Base(c.good), err, out)
		}
		if out, err := exec.Command(tool, c.args(c.bad)...).CombinedOutput(); err == nil && (c.says == "" || !strings.Contains(string(out), c.says)) {
			t.Errorf("%s finds nothing wrong with %s:\n%s", c.name, filepath.Base(c.bad), out)
		}
	}
}
