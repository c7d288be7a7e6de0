package enroll

import (
	"errors"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
)

func TestAppendScan(t *testing.T) {
	a, b := fleet.EKHash{1}, fleet.EKHash{2}
	list, dropped, err := AppendScan(nil, fleet.ListedEK{EK: a, Serial: " S,1 ", Site: "shop-1"}, "ACME Box 7")
	if err != nil || dropped != "" {
		t.Fatal(err, dropped)
	}
	if list, dropped, err = AppendScan(list, fleet.ListedEK{EK: b, Serial: "=cmd()"}, "=1"); err != nil || dropped == "" {
		t.Fatalf("a formula: %v, dropped %q", err, dropped)
	}
	l := ParseList(list)
	if len(l.Problems) != 0 || len(l.EKs) != 2 || l.EKs[0].EK != a || l.EKs[0].Serial != "S,1" || l.EKs[0].Site != "shop-1" || l.EKs[1].EK != b || l.EKs[1].Serial != "" {
		t.Errorf("%s\n%+v", list, l)
	}
	if _, _, err := AppendScan(list, fleet.ListedEK{EK: a}, ""); !errors.Is(err, ErrListed) {
		t.Errorf("a machine that is there already: %v", err)
	}
	if want := a.String() + ",\"S,1\",shop-1,ACME Box 7," + fleet.Words(a.NodeID()) + "\n"; !strings.Contains(string(list), want) || !strings.Contains(string(list), b.String()+",,,,") {
		t.Errorf("for people: %s, want %s", list, want)
	}
	// Somebody's own columns and their order are kept.
	own := "site,label:rack,ek_sha256"
	if list, _, err = AppendScan([]byte(own), fleet.ListedEK{EK: a, Serial: "x", Labels: map[string]string{"rack": "r7"}}, "m"); err != nil || string(list) != own+"\n,r7,"+a.String()+"\n" {
		t.Errorf("%q, %v", list, err)
	}
	for what, c := range map[string]struct {
		list string
		e    fleet.ListedEK
	}{
		"a file that is no list":           {"hello\nworld\n", fleet.ListedEK{EK: a}},
		"a list with a mistake":            {"ek_sha256\nzz\n", fleet.ListedEK{EK: a}},
		"an EK of zeros":                   {"", fleet.ListedEK{}},
		"a site whose name no site has":    {"", fleet.ListedEK{EK: a, Site: "No Site"}},
		"control characters in the header": {"ek_sha256\x1b\n", fleet.ListedEK{EK: a}},
	} {
		if out, _, err := AppendScan([]byte(c.list), c.e, ""); err == nil {
			t.Errorf("%s: %q", what, out)
		}
	}
}

func FuzzAppendScan(f *testing.F) {
	f.Add("", "S1", "shop-1")
	f.Add("ek_sha256,serial\n", "=1+1", "")
	f.Add("ek_sha256,serial\n"+strings.Repeat("0", 63)+"1,\"a\nb\"\n", "\x1b[2J", "x")
	f.Fuzz(func(t *testing.T, list, serial, site string) {
		out, _, err := AppendScan([]byte(list), fleet.ListedEK{EK: fleet.EKHash{7}, Serial: serial, Site: site}, serial)
		if err != nil {
			return
		}
		l := ParseList(out)
		if len(l.Problems) > 0 || len(l.EKs) == 0 || l.EKs[len(l.EKs)-1].EK != (fleet.EKHash{7}) || !strings.HasPrefix(string(out), list) {
			t.Fatalf("%q: %+v", out, l)
		}
	})
}
