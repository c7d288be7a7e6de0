package firmware

import (
	"crypto/sha256"
	"strings"
	"testing"
)

func TestPCR11FollowsTheStub(t *testing.T) {
	// The order in the file does not matter, .pcrsig is not measured, an
	// empty section counts as absent.
	sections := map[string][]byte{
		SectionInitrd: []byte("initrd"), SectionLinux: []byte("kernel"), SectionOSRel: []byte("ID=x\n"),
		SectionPCRSig: []byte("signature"), SectionSplash: {}, SectionPCRPKey: []byte("key"),
	}
	measured := MeasureSections(sections)
	var names []string
	for _, s := range measured {
		names = append(names, s.Name)
	}
	if got, want := strings.Join(names, " "), ".linux .osrel .initrd .pcrpkey"; got != want {
		t.Fatalf("measured %s, want %s", got, want)
	}
	got, err := PCR11(measured)
	if err != nil {
		t.Fatal(err)
	}
	// By hand, without the package's own helpers.
	pcr := make([]byte, 32)
	for _, data := range []string{".linux\x00", "kernel", ".osrel\x00", "ID=x\n", ".initrd\x00", "initrd", ".pcrpkey\x00", "key"} {
		d := sha256.Sum256([]byte(data))
		next := sha256.Sum256(append(pcr, d[:]...))
		pcr = next[:]
	}
	if got != Digest(pcr) {
		t.Errorf("PCR 11 is %s, by hand %x", got, pcr)
	}
}

// A machine's PCR 11 as the TPM of a virtual machine gave it, with the section
// digests of its event log.
func TestPCR11OfARealBoot(t *testing.T) {
	var sections []SectionDigest
	for _, s := range [][2]string{
		{SectionLinux, "51349501a3d1ff83836437d2b365fd2d57f2feb8642d315e5181dec23d4c3275"},
		{SectionOSRel, "18c15b20703e5e441d71561773fad76bb47a4ecf4d148201eed027ba329102a6"},
		{SectionCmdline, "c04af1b0b2c265028541db2827ffa69615e96ac349751f3fc55426468f350c0e"},
		{SectionInitrd, "acb0e17a0276847ad09a365ee98243e69c05d7f88fdc763eae105a7639053608"},
	} {
		sections = append(sections, SectionDigest{s[0], digest(t, s[1])})
	}
	want := digest(t, "2f4c26e3ef3e2ed090f13966d3413fed403e21f3bc093f8b0ec75982bbcb1f97")
	if got, err := PCR11(sections); err != nil || got != want {
		t.Errorf("PCR 11 is %s (%v), the TPM said %s", got, err, want)
	}
	sections[3].SHA256[0] ^= 1
	if got, err := PCR11(sections); err != nil || got == want {
		t.Errorf("another initrd gives the same PCR 11 (%v)", err)
	}
}

func TestPCR11Refuses(t *testing.T) {
	one := SectionDigest{Name: SectionLinux, SHA256: Digest{1}}
	for when, list := range map[string][]SectionDigest{
		"a section is repeated":     {one, one},
		"sections are out of order": {{Name: SectionInitrd}, one},
		"a section is unknown":      {one, {Name: ".uname"}},
		"a section is unmeasured":   {one, {Name: SectionPCRSig}},
	} {
		if _, err := PCR11(list); err == nil {
			t.Errorf("when %s, then no error", when)
		}
	}
}

func TestDigestText(t *testing.T) {
	const good = "51349501a3d1ff83836437d2b365fd2d57f2feb8642d315e5181dec23d4c3275"
	if got := digest(t, good).String(); got != good {
		t.Errorf("%s became %s", good, got)
	}
	for _, bad := range []string{"", good[1:], good + "00", strings.ToUpper(good), "g" + good[1:]} {
		var d Digest
		if err := d.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was read as %s", bad, d)
		}
	}
}

func digest(t testing.TB, s string) Digest {
	t.Helper()
	var d Digest
	if err := d.UnmarshalText([]byte(s)); err != nil {
		t.Fatal(err)
	}
	return d
}
