package main

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// golden compares got with testdata/name; -update rewrites it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s differs (-want +got); go test -update rewrites it:\n%s", path, d)
	}
}

var seen = time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)

// filed is a machine's request; edit changes what it proved.
func filed(t *testing.T, name string, known enroll.Known, edit func(*enroll.Filing)) fleet.Request {
	t.Helper()
	f := enroll.Filing{Tenant: "default", Evidence: evidence(name), Source: "192.0.2.1", Begun: seen, Findings: []fleet.Finding{
		{Check: "ek", OK: true}, {Check: "quote", OK: true},
		{Check: "ek-certificate", OK: true, Detail: "CN=ACME TPM CA"}, {Check: "ek-chain", OK: true, Detail: "vendor root ACME"},
		{Check: "ek-listed", OK: false, Detail: "the EK is on no list"}, {Check: "log-pcr0", OK: true},
		{Check: "boot-measured", OK: true, Detail: "recovery@1"}, {Check: "boot-enforced", OK: false, Detail: "Secure Boot is off"},
	}}
	if edit != nil {
		edit(&f)
	}
	d, err := enroll.File(seen, known, f)
	if err != nil {
		t.Fatal(err)
	}
	return d.Request
}

func TestARequestExplainsItself(t *testing.T) {
	other := func(s string) fleet.HexBytes { h := sha256.Sum256([]byte(s)); return h[:] }
	good := filed(t, "alpha", enroll.Known{}, nil)
	var shown bytes.Buffer
	writeRequest(&shown, seen.Add(3*time.Hour), good, &musterv1.GetRequestResponse{})
	golden(t, "request-good.golden", shown.Bytes())

	approved, _, err := enroll.Approve(seen, good, enroll.Approval{Ruling: enroll.Ruling{Revision: good.Revision, Actor: "preapproval:dell-7", Reason: "its EK is on the list dell-7"}, Site: "shop-7"})
	if err != nil {
		t.Fatal(err)
	}
	changed := filed(t, "alpha", enroll.Known{Requests: []fleet.Request{approved}}, func(f *enroll.Filing) {
		f.Evidence.PCRs = map[int]fleet.HexBytes{0: other("new firmware"), 2: other("new card"), 7: other("switched")}
		f.Evidence.Boot, f.Evidence.Image = fleet.BootUnknown, ""
		f.Findings = append(f.Findings[:5:5], fleet.Finding{Check: "boot-measured", Detail: "the event log does not replay to PCR 4"})
		f.Warnings = []string{"What the machine runs is not proved."}
	})
	out := &musterv1.GetRequestResponse{
		Lab: true, Diff: enroll.Diff(approved.Evidence, changed.Evidence), LookAlikes: []string{`Node n-x claims the same serial number "S-alpha"`},
		Refusal: (enroll.Policy{}).Check(changed.Identity, changed.Boot).Error(),
		BootEvents: []*musterv1.Event{api.EventToProto(fleet.Event{
			Tenant: "default", Time: seen.Add(-time.Minute), Kind: "pxe.served", MAC: "52:54:00:00:00:01", Text: "served recovery\x1b[2J",
		})},
	}
	shown.Reset()
	writeRequest(&shown, seen.Add(20*time.Second), changed, out)
	golden(t, "request-changed.golden", shown.Bytes())

	shown.Reset()
	writeRequest(&shown, seen.Add(72*time.Hour), approved, &musterv1.GetRequestResponse{})
	golden(t, "request-approved.golden", shown.Bytes())
}

func TestTheWideQueueShowsAgeSourceAndWarnings(t *testing.T) {
	quiet := filed(t, "alpha", enroll.Known{}, nil)
	loud := filed(t, "beta", enroll.Known{}, func(f *enroll.Filing) { f.Warnings, f.Source = []string{"a", "b"}, "2001:db8::1" })
	tab := requestTable([]fleet.Request{quiet, loud})
	column := func(row int, name string) string {
		for i, c := range tab.columns {
			if c == name {
				return tab.rows[row][i]
			}
		}
		t.Fatalf("no column %s in %v", name, tab.columns)
		return ""
	}
	for _, c := range []struct {
		row        int
		name, want string
	}{{0, "SOURCE", "192.0.2.1"}, {1, "SOURCE", "2001:db8::1"}, {0, "WARNINGS", ""}, {1, "WARNINGS", "2"}, {0, "AGE", ago(time.Now(), seen)}} {
		if got := column(c.row, c.name); got != c.want {
			t.Errorf("row %d: %s is %q, want %q", c.row, c.name, got, c.want)
		}
	}
}
