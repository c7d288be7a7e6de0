package enroll

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

// Each field of the transcript counts, and no two splits of the same bytes
// give the same transcript.
func TestTranscript(t *testing.T) {
	full := TranscriptFields{
		Nonce: []byte("n"), EK: []byte("e"), AK: []byte("a"), LDevID: []byte("l"),
		CSR: []byte("c"), Hardware: []byte("h"), Exporter: []byte("x"), Claim: []byte("k"),
	}
	seen := map[[32]byte]string{Transcript(full): "unchanged"}
	v := reflect.ValueOf(&full).Elem()
	for i := range v.NumField() {
		old := v.Field(i).Bytes()
		for _, b := range [][]byte{nil, append(bytes.Clone(old), 0)} {
			v.Field(i).SetBytes(b)
			got := Transcript(full)
			if other, ok := seen[got]; ok {
				t.Errorf("%s changed, and the transcript is that of %s", v.Type().Field(i).Name, other)
			}
			seen[got] = v.Type().Field(i).Name
		}
		v.Field(i).SetBytes(old)
	}
	moved := full
	moved.Nonce, moved.EK = []byte("ne"), nil
	if _, ok := seen[Transcript(moved)]; ok {
		t.Error("a byte moved from one field to the next, and the transcript is the same")
	}
}

func TestProof(t *testing.T) {
	transcript := [32]byte{1}
	if !CheckProof(Proof([]byte("secret"), transcript), []byte("secret"), transcript) {
		t.Error("a good proof failed")
	}
	for name, ok := range map[string]bool{
		"other secret":     CheckProof(Proof([]byte("other"), transcript), []byte("secret"), transcript),
		"other transcript": CheckProof(Proof([]byte("secret"), [32]byte{2}), []byte("secret"), transcript),
		"no secret":        CheckProof(Proof(nil, transcript), nil, transcript),
		"no proof":         CheckProof(nil, []byte("secret"), transcript),
	} {
		if ok {
			t.Errorf("%s: passed", name)
		}
	}
}

// The digest covers exactly the stable fields, and Diff speaks exactly when
// the digest differs.
func TestEvidenceDigestAndDiff(t *testing.T) {
	base := evidence("a")
	for _, c := range []struct {
		name    string
		change  func(*fleet.Evidence)
		covered bool
	}{
		{"EK", func(e *fleet.Evidence) { e.EK[0]++ }, true},
		{"AK", func(e *fleet.Evidence) { e.AKName = hashOf("x") }, true},
		{"LDevID name", func(e *fleet.Evidence) { e.LDevIDName = hashOf("x") }, true},
		{"LDevID key", func(e *fleet.Evidence) { e.LDevIDKey = hashOf("x") }, true},
		{"identity", func(e *fleet.Evidence) { e.Identity = fleet.IdentityListed }, true},
		{"boot", func(e *fleet.Evidence) { e.Boot = fleet.BootEnforced }, true},
		{"image", func(e *fleet.Evidence) { e.Image = "x" }, true},
		{"PCR 0", func(e *fleet.Evidence) { e.PCRs[0] = hashOf("x") }, true},
		{"PCR 2", func(e *fleet.Evidence) { e.PCRs[2] = nil }, true},
		{"PCR 7", func(e *fleet.Evidence) { e.PCRs[7] = hashOf("x") }, true},
		{"TPM vendor", func(e *fleet.Evidence) { e.TPMVendor = "x" }, true},
		{"TPM firmware", func(e *fleet.Evidence) { e.TPMFirmware = "x" }, true},
		{"board", func(e *fleet.Evidence) { e.Board = "x" }, true},
		{"serial", func(e *fleet.Evidence) { e.Serial = "" }, true},
		{"UUID", func(e *fleet.Evidence) { e.UUID = "x" }, true},
		{"PCR 4", func(e *fleet.Evidence) { e.PCRs[4] = hashOf("x") }, false},
		{"aliases", func(e *fleet.Evidence) { e.Aliases = []fleet.EKHash{{1}} }, false},
		{"issuer", func(e *fleet.Evidence) { e.EKIssuer = "x" }, false},
		{"memory", func(e *fleet.Evidence) { e.Hardware.MemoryBytes = 1 }, false},
		{"link", func(e *fleet.Evidence) { e.Hardware.NICs = []fleet.NIC{{Name: "eth0", Link: true}} }, false},
	} {
		e := evidence("a")
		c.change(&e)
		if got := EvidenceDigest(e) != EvidenceDigest(base); got != c.covered {
			t.Errorf("when %s changes, digest differs: %v, want %v", c.name, got, c.covered)
		}
		if got := Diff(base, e); (len(got) > 0) != c.covered {
			t.Errorf("when %s changes, the difference is %q", c.name, got)
		}
	}
}

// The table of verdicts, written out a second time.
func TestPolicy(t *testing.T) {
	lab := Policy{Lab: true, UnknownBoot: true, Unverified: true}
	for _, c := range []struct {
		identity fleet.IdentityTrust
		boot     fleet.BootTrust
		// normal: outside of labs; plain: in a lab without exceptions; open:
		// in a lab with both.
		normal, plain, open bool
	}{
		{fleet.IdentityUnverified, fleet.BootUnknown, false, false, true},
		{fleet.IdentityUnverified, fleet.BootMeasured, false, false, true},
		{fleet.IdentityUnverified, fleet.BootEnforced, false, false, true},
		{fleet.IdentityLab, fleet.BootUnknown, false, false, true},
		{fleet.IdentityLab, fleet.BootMeasured, false, true, true},
		{fleet.IdentityLab, fleet.BootEnforced, false, true, true},
		{fleet.IdentityListed, fleet.BootUnknown, false, false, true},
		{fleet.IdentityListed, fleet.BootMeasured, true, true, true},
		{fleet.IdentityListed, fleet.BootEnforced, true, true, true},
		{fleet.IdentityHardware, fleet.BootUnknown, false, false, true},
		{fleet.IdentityHardware, fleet.BootMeasured, true, true, true},
		{fleet.IdentityHardware, fleet.BootEnforced, true, true, true},
		{fleet.IdentityHardware + 1, fleet.BootEnforced, false, false, false},
		{fleet.IdentityHardware, fleet.BootEnforced + 1, false, false, false},
	} {
		for name, p := range map[string]struct {
			policy Policy
			want   bool
		}{
			"default":                      {Policy{}, c.normal},
			"lab, both allowed":            {lab, c.open},
			"lab, nothing allowed":         {Policy{Lab: true}, c.plain},
			"no lab, but switches left on": {Policy{UnknownBoot: true, Unverified: true}, c.normal},
		} {
			if err := p.policy.Check(c.identity, c.boot); (err == nil) != p.want {
				t.Errorf("%s/%s, %s: %v", c.identity, c.boot, name, err)
			}
		}
	}
}

// An approval whose evidence was swapped in the store does not count.
func TestWhenEvidenceIsNotWhatTheIDNamesThenRefuse(t *testing.T) {
	r := newRequest(start, Known{}, filing(evidence("a"), 1, start))
	r.Revision = 1
	approval := Approval{Ruling: Ruling{Revision: 1, Actor: "user:eve"}}
	good, _, err := Approve(start, r, approval)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*fleet.Request){
		"key":      func(r *fleet.Request) { r.Evidence.LDevIDKey = hashOf("x") },
		"identity": func(r *fleet.Request) { r.Identity = fleet.IdentityListed },
		"boot":     func(r *fleet.Request) { r.Boot = fleet.BootEnforced },
		"node":     func(r *fleet.Request) { r.Node = evidence("b").EK.NodeID() },
	} {
		bad := r
		change(&bad)
		if _, _, err := Approve(start, bad, approval); err == nil {
			t.Errorf("%s swapped: approved", name)
		}
	}
	swapped := good
	swapped.Evidence.LDevIDKey = hashOf("x")
	if _, _, err := Issue(start, swapped, Issued{LDevIDKey: hashOf("x")}); err == nil {
		t.Error("issued for a key that was swapped in behind the approval")
	}
}

func TestIssuedReusable(t *testing.T) {
	i := Issued{Certificates: [][]byte{{1}}, LDevIDKey: hashOf("k"), NotBefore: start, NotAfter: start.Add(30 * 24 * time.Hour)}
	for _, c := range []struct {
		name string
		key  []byte
		at   time.Duration
		want bool
	}{
		{"fresh", hashOf("k"), 0, true},
		{"last third", hashOf("k"), 20 * 24 * time.Hour, false},
		{"other key", hashOf("x"), 0, false},
		{"no key", nil, 0, false},
	} {
		if got := i.Reusable(c.key, start.Add(c.at)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestLookAlikesIsBounded(t *testing.T) {
	var others []fleet.Request
	for _, n := range []string{"b", "c", "d", "e", "f", "a"} {
		e := evidence(n)
		e.Serial, e.UUID = "S-a", ""
		others = append(others, fleet.Request{Node: e.EK.NodeID(), Evidence: e})
	}
	e := evidence("a")
	e.UUID = ""
	if got := LookAlikes(e, others); len(got) != 3 {
		t.Errorf("%d warnings: %q", len(got), got)
	}
}

// Clocks are compared as serial numbers: whatever the constant offset of the
// counters is, later is later.
func TestClockOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		offset := rapid.Uint32().Draw(t, "offset")
		a := fleet.TPMClock{Resets: offset, Restarts: offset, Millis: 50}
		b := a
		switch rapid.IntRange(0, 2).Draw(t, "what") {
		case 0:
			b.Resets += rapid.Uint32Range(1, 1<<20).Draw(t, "resets")
			b.Millis = 0
		case 1:
			b.Restarts += rapid.Uint32Range(1, 1<<20).Draw(t, "restarts")
		case 2:
			b.Millis += rapid.Uint64Range(1, 1<<40).Draw(t, "millis")
		}
		if !b.After(a) || a.After(b) || a.After(a) {
			t.Fatalf("%+v is not after %+v", b, a)
		}
	})
}
