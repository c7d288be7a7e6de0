package device_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

var platform = tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}

// nvDelete removes an index that the maker defined, which the platform may.
func nvDelete(t *testing.T, s *swtpmtest.TPM, index tpm2.TPMHandle) {
	t.Helper()
	r := raw(t, s)
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.NVUndefineSpace{
		AuthHandle: platform,
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
	}).Execute(r); err != nil {
		t.Fatal(err)
	}
}

// nvPut defines an index as TPM makers do, and writes it.
func nvPut(t *testing.T, s *swtpmtest.TPM, index tpm2.TPMHandle, data []byte, attributes tpm2.TPMANV) {
	t.Helper()
	r := raw(t, s)
	attributes.PlatformCreate, attributes.PPWrite, attributes.NoDA = true, true, true
	public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, Attributes: attributes, DataSize: uint16(len(data))}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: platform, PublicInfo: tpm2.New2B(public)}).Execute(r); err != nil {
		t.Fatal(err)
	}
	for offset := 0; offset < len(data); offset += 512 {
		pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (tpm2.NVWrite{
			AuthHandle: platform,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data[offset:min(offset+512, len(data))]},
			Offset:     uint16(offset),
		}).Execute(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEachKindOfEKActivates(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	for _, kind := range []struct {
		name        string
		index       uint32
		bits        int
		persistent  bool
		wantAliases int
	}{
		// The maker's own: RSA-2048 and P-384, both persistent.
		{"RSA-2048", 0x01C00002, 2048, true, 1},
		{"P-384 (H-3)", 0x01C00016, 384, true, 0},
		// Certified here, from the template.
		{"P-256", 0x01C0000A, 256, false, 0},
		{"P-256 (H-2)", 0x01C00014, 256, false, 0},
		{"RSA-2048 (H-1)", 0x01C00012, 2048, false, 0},
	} {
		t.Run(kind.name, func(t *testing.T) {
			d := open(t, s)
			if !kind.persistent {
				certifyEK(t, s, kind.index)
			}
			id := identity(t, d)
			if len(id.EKs) != 1+kind.wantAliases || len(id.Problems) != 0 {
				t.Fatalf("%d EKs, problems %v", len(id.EKs), id.Problems)
			}
			ek := parse(t, id.EKs[0].Public)
			if ek.Bits != kind.bits {
				t.Fatalf("the identity EK has %d bits", ek.Bits)
			}
			activate(t, d, ek, parse(t, id.AKPublic))
			nvDelete(t, s, tpm2.TPMHandle(kind.index))
		})
	}
	t.Run("when no EK has a certificate then RSA-2048", func(t *testing.T) {
		d := open(t, s)
		id := identity(t, d)
		if len(id.EKs) != 1 || parse(t, id.EKs[0].Public).Bits != 2048 || id.EKs[0].Certificate != nil {
			t.Fatalf("got %+v", id.EKs)
		}
		activate(t, d, parse(t, id.EKs[0].Public), parse(t, id.AKPublic))
	})
}

// certifyEK makes the EK of the kind with this index and stores a
// certificate for it.
func certifyEK(t *testing.T, s *swtpmtest.TPM, index uint32) {
	t.Helper()
	for _, kind := range tpm.EKKinds() {
		if kind.Certificate != index {
			continue
		}
		r := raw(t, s)
		rsp, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			InPublic:      tpm2.New2B(kind.Public),
		}.Execute(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}).Execute(r); err != nil {
			t.Fatal(err)
		}
		der, err := s.CA.Certify(parse(t, rsp.OutPublic.Bytes()).Public, nil)
		if err != nil {
			t.Fatal(err)
		}
		nvPut(t, s, tpm2.TPMHandle(index), der, tpm2.TPMANV{AuthRead: true})
		return
	}
	t.Fatalf("no kind of EK with index 0x%x", index)
}

func TestIdentityWhenNVIsOddThen(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	own := identity(t, open(t, s))
	swap := func(certificate []byte, attributes tpm2.TPMANV) device.Identity {
		nvDelete(t, s, 0x01C00002)
		nvPut(t, s, 0x01C00002, certificate, attributes)
		return identity(t, open(t, s))
	}
	t.Run("a certificate longer than one chunk is read whole", func(t *testing.T) {
		long := append(bytes.Clone(own.EKs[0].Certificate), bytes.Repeat([]byte{0xff}, 2000-len(own.EKs[0].Certificate))...)
		id := swap(long, tpm2.TPMANV{AuthRead: true})
		if !bytes.Equal(id.EKs[0].Certificate, long) {
			t.Errorf("read %d bytes of %d", len(id.EKs[0].Certificate), len(long))
		}
	})
	t.Run("a certificate for the owner's eyes is read", func(t *testing.T) {
		id := swap(own.EKs[0].Certificate, tpm2.TPMANV{OwnerRead: true})
		if !bytes.Equal(id.EKs[0].Certificate, own.EKs[0].Certificate) {
			t.Error("was not read")
		}
	})
	t.Run("a certificate that we may not read is left out", func(t *testing.T) {
		id := swap(own.EKs[0].Certificate, tpm2.TPMANV{PPRead: true})
		if len(id.EKs) != 1 || len(id.Problems) != 1 || parse(t, id.EKs[0].Public).Curve != "P-384" {
			t.Errorf("%d EKs, problems %v", len(id.EKs), id.Problems)
		}
	})
	t.Run("a certificate for another key is left out", func(t *testing.T) {
		id := swap(own.EKs[1].Certificate, tpm2.TPMANV{AuthRead: true})
		if len(id.EKs) != 1 || len(id.Problems) != 1 {
			t.Errorf("%d EKs, problems %v", len(id.EKs), id.Problems)
		}
	})
	t.Run("intermediates are cut out of their indices", func(t *testing.T) {
		swap(own.EKs[0].Certificate, tpm2.TPMANV{AuthRead: true})
		a, b := s.CA.Root.Raw, own.EKs[1].Certificate
		all := slices.Concat(a, b)
		nvPut(t, s, 0x01C00100, all[:100], tpm2.TPMANV{AuthRead: true})
		nvPut(t, s, 0x01C00101, all[100:], tpm2.TPMANV{AuthRead: true})
		id := identity(t, open(t, s))
		if len(id.EKs[0].Chain) != 2 || !bytes.Equal(id.EKs[0].Chain[0], a) {
			t.Errorf("chain of %d, problems %v", len(id.EKs[0].Chain), id.Problems)
		}
	})
	t.Run("a nonce changes the EK", func(t *testing.T) {
		nvPut(t, s, 0x01C00003, []byte("a maker's nonce"), tpm2.TPMANV{AuthRead: true})
		nvDelete(t, s, 0x01C00002)
		nvDelete(t, s, 0x01C00016)
		id := identity(t, open(t, s))
		if bytes.Equal(id.EKs[0].Public, own.EKs[0].Public) {
			t.Error("the EK is that without nonce")
		}
		nvDelete(t, s, 0x01C00003)
	})
	t.Run("a template of the maker makes the EK", func(t *testing.T) {
		nvPut(t, s, 0x01C00004, tpm2.Marshal(tpm2.RSAEKTemplate), tpm2.TPMANV{AuthRead: true})
		id := identity(t, open(t, s))
		if !bytes.Equal(id.EKs[0].Public, own.EKs[0].Public) {
			t.Error("the same template made another EK")
		}
		nvDelete(t, s, 0x01C00004)
		nvPut(t, s, 0x01C00004, []byte("not a template"), tpm2.TPMANV{AuthRead: true})
		id = identity(t, open(t, s))
		if len(id.EKs) != 1 || bytes.Equal(id.EKs[0].Public, own.EKs[0].Public) {
			t.Error("an unusable template did not move on to the next kind")
		}
	})
}

func TestWhenAForeignKeyLiesAtTheEKsHandleThenItIsNotUsed(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	own := identity(t, open(t, s))
	r := raw(t, s)
	const handle = 0x81010001
	persistent, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(handle)}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	evict := func(h tpm2.TPMHandle, name tpm2.TPM2BName) {
		t.Helper()
		if _, err := (tpm2.EvictControl{
			Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			ObjectHandle:     tpm2.NamedHandle{Handle: h, Name: name},
			PersistentHandle: handle,
		}).Execute(r); err != nil {
			t.Fatal(err)
		}
	}
	evict(handle, persistent.Name)
	// The same template with another `unique` in the endorsement hierarchy
	// passes for an EK in all but the key.
	foreign := tpm2.RSAEKTemplate
	foreign.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: bytes.Repeat([]byte{1}, 256)})
	k, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(foreign),
	}.Execute(r)
	if err != nil {
		t.Fatal(err)
	}
	evict(k.ObjectHandle, k.Name)
	d := open(t, s)
	id := identity(t, d)
	if !bytes.Equal(id.EKs[0].Public, own.EKs[0].Public) {
		t.Fatal("the foreign key passed for the EK")
	}
	activate(t, d, parse(t, id.EKs[0].Public), parse(t, id.AKPublic))
}

func TestWhenTheTPMHasAnOwnerThenErrOwned(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	if _, err := (tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("somebody's")},
	}).Execute(raw(t, s)); err != nil {
		t.Fatal(err)
	}
	_, err := open(t, s).Identity(context.Background())
	if !errors.Is(err, device.ErrOwned) {
		t.Fatalf("got %v", err)
	}
}

// TestRelayOfAForeignEK: machine A wants to be machine B. It shows B's EK
// (public, with B's genuine certificate) and its own AK. The credential that
// comes back is for B's EK and A's AK: neither TPM opens it.
func TestRelayOfAForeignEK(t *testing.T) {
	a, b := swtpmtest.Start(t, swtpmtest.Options{}), swtpmtest.Start(t, swtpmtest.Options{})
	da, db := open(t, a), open(t, b)
	ida, idb := identity(t, da), identity(t, db)
	if bytes.Equal(ida.EKs[0].Public, idb.EKs[0].Public) || bytes.Equal(ida.AKPublic, idb.AKPublic) {
		t.Fatal("two TPMs share keys")
	}
	blob, enc, err := tpm.MakeCredential(rand.Reader, parse(t, idb.EKs[0].Public), parse(t, ida.AKPublic).Name, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := da.ActivateCredential(blob, enc); err == nil {
		t.Error("A opened a credential for B's EK")
	}
	if _, err := db.ActivateCredential(blob, enc); err == nil {
		t.Error("B opened a credential for A's AK")
	}
}
