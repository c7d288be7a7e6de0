package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const frozenWords = "186d2a3024622b764375d26bd1f7fb6e1be8c4f80a6d5b42fc1d9064a253b31f"

func TestWordListIsEasyToSpeak(t *testing.T) {
	list := wordList()
	if len(list) != 1024 {
		t.Fatalf("list has %d words, want 1024", len(list))
	}
	if !slices.IsSorted(list) {
		t.Error("list is not sorted")
	}
	form := regexp.MustCompile(`^[a-z]{3,7}$`)
	heads := map[string]string{}
	for _, w := range list {
		if !form.MatchString(w) {
			t.Errorf("%q is not 3-7 lower-case letters", w)
		}
		h := w[:min(4, len(w))]
		if other, taken := heads[h]; taken {
			t.Errorf("%q and %q share their first four letters", w, other)
		}
		heads[h] = w
	}
	for i, a := range list {
		for _, b := range list[i+1:] {
			if strings.HasPrefix(b, a) {
				t.Errorf("%q begins with %q", b, a)
			}
			if oneLetterApart(a, b) {
				t.Errorf("%q and %q differ in one letter", a, b)
			}
			if sound(a) == sound(b) {
				t.Errorf("%q and %q sound alike", a, b)
			}
		}
	}
}

func TestSoundFindsHomophones(t *testing.T) {
	for _, pair := range [][2]string{{"write", "rite"}, {"knight", "nite"}, {"steel", "steal"}, {"phase", "faze"}} {
		if sound(pair[0]) != sound(pair[1]) {
			t.Errorf("%q and %q are taken for different sounds", pair[0], pair[1])
		}
	}
	if sound("amber") == sound("canoe") {
		t.Error("different words are taken for one sound")
	}
	if !oneLetterApart("cat", "cart") || !oneLetterApart("cat", "cut") || oneLetterApart("cat", "dog") {
		t.Error("oneLetterApart is wrong")
	}
}

// The words of a node must never change: people wrote them on the boxes.
func TestWordsAreFrozen(t *testing.T) {
	sum := sha256.Sum256([]byte(wordFile))
	if got := hex.EncodeToString(sum[:]); got != frozenWords {
		t.Errorf("words.txt has digest %s, want %s", got, frozenWords)
	}
}

func TestWords(t *testing.T) {
	list := wordList()
	var h EKHash
	for _, row := range []struct {
		name  string
		bytes string
		want  []int
	}{
		{"all bits 0", "0000000000000000", []int{0, 0, 0, 0, 0, 0}},
		{"all bits 1", "ffffffffffffffff", []int{1023, 1023, 1023, 1023, 1023, 1023}},
		// 0000000001 0000000010 0000000011 0000000100 0000000101 0000000110 0000
		{"1 to 6", "0040200c04014060", []int{1, 2, 3, 4, 5, 6}},
	} {
		b, err := hex.DecodeString(row.bytes)
		if err != nil {
			t.Fatal(err)
		}
		copy(h[:], b)
		var want []string
		for _, i := range row.want {
			want = append(want, list[i])
		}
		if got := Words(h.NodeID()); got != strings.Join(want, " ") {
			t.Errorf("%s: words are %q, want %q", row.name, got, want)
		}
	}
	for _, bad := range []NodeID{"", "n-", "n-ABC", "r-aaaaaaaaaaaaaaaaaaaaaaaa"} {
		if got := Words(bad); got != "" {
			t.Errorf("malformed ID %q has words %q", bad, got)
		}
	}
}

func TestWordsDependOnTheFirst60BitsOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := EKHash(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "a"))
		b := EKHash(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "b"))
		same := bytes.Equal(a[:7], b[:7]) && a[7]>>4 == b[7]>>4
		if (Words(a.NodeID()) == Words(b.NodeID())) != same {
			t.Fatalf("words of %s and %s: equal is not %v", a, b, same)
		}
		copy(b[:7], a[:7])
		b[7] = a[7]&0xf0 | b[7]&0x0f
		if Words(a.NodeID()) != Words(b.NodeID()) {
			t.Fatalf("words of %s and %s differ", a, b)
		}
	})
}

// sound is a coarse key of how a word is spoken.
func sound(w string) string {
	w = soundRules.Replace(w)
	w = strings.TrimSuffix(w, "e")
	return string(slices.Compact([]byte(vowelRules.Replace(w))))
}

var (
	soundRules = strings.NewReplacer("igh", "i", "ph", "f", "gh", "", "kn", "n", "wr", "r", "wh", "w",
		"ck", "k", "qu", "kw", "dge", "j", "ce", "se", "ci", "si", "cy", "si", "sh", "S", "ch", "C",
		"c", "k", "x", "ks", "z", "s", "y", "i")
	vowelRules = strings.NewReplacer("ea", "2", "ee", "2", "ie", "2", "ai", "1", "ei", "1", "oa", "o",
		"oo", "3", "ou", "3", "ew", "3", "ow", "3")
)

func oneLetterApart(a, b string) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	switch len(b) - len(a) {
	case 0:
		n := 0
		for i := range len(a) {
			if a[i] != b[i] {
				n++
			}
		}
		return n == 1
	case 1:
		for i := range len(b) {
			if b[:i]+b[i+1:] == a {
				return true
			}
		}
	}
	return false
}
