package fleet

import (
	_ "embed"
	"encoding/binary"
	"strings"
	"sync"
)

// words.txt holds 1024 short English words, one per line, sorted. No two
// share their first four letters, none begins with another one, and words
// that sound alike were left out: the words are read aloud over a phone and
// typed by people who look at a screen across the room. The order is frozen:
// a change would give every node another name.
//
//go:embed words.txt
var wordFile string

var wordList = sync.OnceValue(func() []string { return strings.Fields(wordFile) })

const (
	wordsPerID  = 6
	bitsPerWord = 10
)

// Words returns the spoken form of a node ID: six words of 10 bits each, from
// the first 60 of the ID's 120 bits. It is "" for a malformed ID. Words are
// for people who compare what two screens show; they are never a key.
func Words(id NodeID) string {
	raw, err := id.bytes()
	if err != nil {
		return ""
	}
	list := wordList()
	bits := binary.BigEndian.Uint64(raw)
	out := make([]string, wordsPerID)
	for i := range out {
		shift := 64 - bitsPerWord*(i+1)
		out[i] = list[bits>>shift&(1<<bitsPerWord-1)]
	}
	return strings.Join(out, " ")
}
