package enroll

import (
	"fmt"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
)

func hexEK(name string) string { return fleet.EKHash(hashOf("ek " + name)).String() }

func TestAGoodListIsRead(t *testing.T) {
	colons := strings.Join(strings.SplitAfter(hexEK("b"), "")[:2], "") + ":" + hexEK("b")[2:]
	l := ParseList([]byte("\xef\xbb\xbfek_sha256, serial,site,label:rack\r\n" +
		hexEK("a") + ",S-1,shop-7,r1\r\n\r\n" + strings.ToUpper(colons) + ",\"S, 2\",,\r\n"))
	if len(l.Problems) != 0 || len(l.EKs) != 2 {
		t.Fatalf("%+v", l)
	}
	a, b := l.EKs[0], l.EKs[1]
	if a.EK.String() != hexEK("a") || a.Serial != "S-1" || a.Site != "shop-7" || a.Labels["rack"] != "r1" {
		t.Errorf("%+v", a)
	}
	if b.EK.String() != hexEK("b") || b.Serial != "S, 2" || b.Site != "" || len(b.Labels) != 0 || l.Lines[1] != 4 {
		t.Errorf("%+v on line %d", b, l.Lines[1])
	}
	if only := ParseList([]byte("ek_sha256\n" + hexEK("a"))); len(only.Problems) != 0 || len(only.EKs) != 1 {
		t.Errorf("one column: %+v", only)
	}
}

func TestWhenAListIsBadThenEveryLineOfItIsNamed(t *testing.T) {
	got := ParseList([]byte(strings.Join([]string{
		"ek_sha256,serial,site,label:rack",
		hexEK("a") + ",S-1,shop-7,r1",
		"12ab,S-2,,",
		hexEK("b") + ",=cmd|'/C calc'!A0,Shop 7,bad value!",
		hexEK("a") + ",S-4,,",
		hexEK("c") + ",S-5",
		hexEK("d") + ",\u202egnp,,",
		strings.Repeat("0", 64) + ",,pool,",
		hexEK("e") + "," + strings.Repeat("x", 300) + ",,",
	}, "\n")))
	var b strings.Builder
	for _, p := range got.Problems {
		fmt.Fprintf(&b, "line %d: %s\n", p.Line, p.Why)
	}
	golden(t, "eklist.golden", b.String())
}

func TestWhenAFileIsNoListThenItSaysWhy(t *testing.T) {
	for name, row := range map[string]struct{ csv, want string }{
		"empty":          {"", "no header"},
		"header only":    {"ek_sha256\n", "lists no machine"},
		"no EKs":         {"serial\nS\n", "ek_sha256 is missing"},
		"unknown column": {"ek_sha256,price\n", `"price" is not known`},
		"twice":          {"ek_sha256,ek_sha256\n", "there twice"},
		"label key":      {"ek_sha256,label:a b\n", "label key"},
		"many columns":   {strings.Repeat("serial,", 100) + "ek_sha256\n", "101 columns"},
		"no text":        {"ek_sha256\n\xff\xfe", "not UTF-8"},
		"stray quote":    {"ek_sha256\n" + hexEK("a") + "\n\"ab\"c\n" + hexEK("b") + "\n", "no CSV"},
		"too long":       {strings.Repeat("x", MaxListBytes+1), "at most 10485760"},
	} {
		l := ParseList([]byte(row.csv))
		if len(l.Problems) != 1 || !strings.Contains(l.Problems[0].Why, row.want) {
			t.Errorf("%s: %+v", name, l.Problems)
		}
	}
}

func TestListsAreCapped(t *testing.T) {
	var b strings.Builder
	b.WriteString("ek_sha256\n")
	for i := range fleet.MaxListedEKs {
		fmt.Fprintf(&b, "%064x\n", i+1)
	}
	if l := ParseList([]byte(b.String())); len(l.Problems) != 0 || len(l.EKs) != fleet.MaxListedEKs {
		t.Fatalf("a list of the greatest length: %d EKs, %+v", len(l.EKs), l.Problems)
	}
	fmt.Fprintf(&b, "%064x\n", fleet.MaxListedEKs+1)
	if l := ParseList([]byte(b.String())); len(l.Problems) != 1 || !strings.Contains(l.Problems[0].Why, "more than 100000") {
		t.Errorf("one line more: %+v", l.Problems)
	}
	bad := ParseList([]byte("ek_sha256\n" + strings.Repeat("x\n", 5000)))
	if len(bad.Problems) != maxListProblems || bad.More != 5000-maxListProblems {
		t.Errorf("%d problems and %d more", len(bad.Problems), bad.More)
	}
}

func FuzzParseList(f *testing.F) {
	f.Add([]byte("ek_sha256,serial,site,label:a\n" + hexEK("a") + ",S,shop,x\n"))
	f.Add([]byte("ek_sha256\n\"\n"))
	f.Add([]byte("\xef\xbb\xbf"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := ParseList(b)
		if len(l.EKs) != len(l.Lines) || len(l.EKs) == 0 && len(l.Problems) == 0 {
			t.Fatalf("%+v", l)
		}
		seen := map[fleet.EKHash]bool{}
		for _, e := range l.EKs {
			if seen[e.EK] {
				t.Fatalf("%s twice", e.EK)
			}
			seen[e.EK] = true
			if e.Site != "" && fleet.ValidateName("site", e.Site) != nil || fleet.ValidateLabels(e.Labels) != nil || unfit(e.Serial) != "" {
				t.Fatalf("%+v", e)
			}
		}
	})
}
