package device_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

const markIndex = tpm2.TPMHandle(0x01806D75)

func TestMark(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	d := open(t, s)
	want := func(mark string) {
		t.Helper()
		got, err := d.Mark()
		if err != nil || got != mark {
			t.Fatalf("mark %q, %v; want %q", got, err, mark)
		}
	}
	want("")
	if err := d.SetMark(""); err != nil { // removing nothing
		t.Fatal(err)
	}
	for _, m := range []string{"0123456789abcdef0123456789abcdef", "u", strings.Repeat("x", device.MaxMark), "u"} {
		for range 2 { // the second one writes nothing
			if err := d.SetMark(m); err != nil {
				t.Fatal(err)
			}
			want(m)
		}
	}
	if err := d.SetMark(strings.Repeat("x", device.MaxMark+1)); err == nil {
		t.Error("a mark that is too long was taken")
	}
	want("u")
	// It survives the program, and the keys still work beside it.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, s)
	want("u")
	if len(identity(t, d).EKs) == 0 {
		t.Error("no EK")
	}
	if err := d.SetMark(""); err != nil {
		t.Fatal(err)
	}
	want("")
}

func TestMarkLeavesWhatIsNotOurs(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	r := raw(t, s)
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: tpm2.TPMIRHNVIndex(markIndex), NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NT: tpm2.TPMNTOrdinary}}),
	}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	d := open(t, s)
	if _, err := d.Mark(); err == nil {
		t.Error("foreign data was read as a mark")
	}
	if err := d.SetMark("u"); err == nil {
		t.Error("foreign data was replaced")
	}
}

func TestMarkDefinedAndNeverWritten(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	d := open(t, s)
	if err := d.SetMark("u"); err != nil {
		t.Fatal(err)
	}
	_ = d.Close()
	r := raw(t, s)
	pub, err := tpm2.NVReadPublic{NVIndex: markIndex}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: markIndex, Name: pub.NVName}}).Execute(r); err != nil {
		t.Fatal(err)
	}
	c, err := pub.NVPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	c.Attributes.Written = false
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(*c)}).Execute(r); err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	d = open(t, s)
	if m, err := d.Mark(); err != nil || m != "" {
		t.Fatalf("%q, %v", m, err)
	}
	if err := d.SetMark("v"); err != nil {
		t.Fatal(err)
	}
	if m, err := d.Mark(); err != nil || m != "v" {
		t.Fatalf("%q, %v", m, err)
	}
}

func TestMarkWithoutRoom(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	r := raw(t, s)
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	full := false
	for size := uint16(2048); size >= 8; size /= 2 {
		for i := uint32(0); i < 512; i++ {
			_, err := tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
				NVIndex: tpm2.TPMIRHNVIndex(0x01900000 + uint32(size)<<10 + i), NameAlg: tpm2.TPMAlgSHA256, DataSize: size,
				Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NT: tpm2.TPMNTOrdinary}})}.Execute(r)
			if errors.Is(err, tpm2.TPMRCNVSpace) {
				full = true
				break
			}
			if err != nil {
				t.Fatal(fmt.Errorf("fill: %w", err))
			}
		}
	}
	if !full {
		t.Fatal("the TPM never got full")
	}
	_ = r.Close()
	if err := open(t, s).SetMark("u"); !errors.Is(err, device.ErrNoRoom) {
		t.Fatalf("got %v, want ErrNoRoom", err)
	}
}
