package fleet

import "testing"

func TestSelector(t *testing.T) {
	labels := map[string]string{"region": "north", "tier": "shop", "empty": "", "muster/site": "shop-7"}
	for _, c := range []struct {
		s         string
		canonical string
		matches   bool
	}{
		{"", "", true},
		{" ", "", true},
		{"region=north", "region=north", true},
		{"region==north", "region=north", true},
		{"region = north , tier=shop", "region=north,tier=shop", true},
		{"region=south", "region=south", false},
		{"region!=south", "region!=south", true},
		{"region!=north", "region!=north", false},
		{"none!=x", "none!=x", true},
		{"none=x", "none=x", false},
		{"region in (south, north,north)", "region in (north,south)", true},
		{"region in (south)", "region=south", false},
		{"region notin (south,west),tier", "region notin (south,west),tier", true},
		{"none notin (a,b)", "none notin (a,b)", true},
		{"region", "region", true},
		{"!region", "!region", false},
		{"!none", "!none", true},
		{"empty=", "empty=", true},
		{"tier=", "tier=", false},
		{"muster/site=shop-7", "muster/site=shop-7", true},
	} {
		s, err := ParseSelector(c.s)
		if err != nil {
			t.Errorf("%q: %v", c.s, err)
			continue
		}
		if s.String() != c.canonical {
			t.Errorf("%q: canonical form %q, want %q", c.s, s, c.canonical)
		}
		if s.Matches(labels) != c.matches {
			t.Errorf("%q: matches %v, want %v", c.s, !c.matches, c.matches)
		}
	}
}

func TestSelectorRefuses(t *testing.T) {
	for _, s := range []string{",", "a=b,", "=b", "a=b=c", "a in b", "a in (b", "a in ((b))", "a b", "!", "a=-", "a=\x1b", "a in", "!a=b=c"} {
		if got, err := ParseSelector(s); err == nil {
			t.Errorf("%q was read as %q", s, got)
		}
	}
}

func FuzzSelector(f *testing.F) {
	for _, s := range []string{"a=b", "a in (b,c),!d", "x notin (y)", "muster/site=shop-7", "a=,b!=", "((", "a in ()"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSelector(in)
		if err != nil {
			return
		}
		again, err := ParseSelector(s.String())
		if err != nil || again.String() != s.String() {
			t.Fatalf("%q gives %q, which gives %q, %v", in, s, again, err)
		}
	})
}
