package fetch

import (
	"strings"
	"testing"
	"time"
)

// When the only source sent wrong bytes, people hear that, and not that nobody
// has the file; and the wait stays short enough for a new source to be found.
func TestOnlySourceLied(t *testing.T) {
	var p Picker
	now := time.Unix(1000, 0)
	p.Note(now, "centre", Lied, "it sent other bytes", 0)
	_, wait, why, ok := p.Pick(now.Add(time.Second), []string{"centre"})
	if ok || wait != pauseMost || !strings.Contains(why, "centre: it sent other bytes") {
		t.Errorf("%v %v %q", ok, wait, why)
	}
	p.Note(now, "peer", Nothing, "it does not answer", 1)
	_, wait, why, ok = p.Pick(now, []string{"centre", "peer"})
	if ok || wait > pauseFirst || !strings.Contains(why, "peer: ") {
		t.Errorf("the one that is asked next is not named: %v %v %q", ok, wait, why)
	}
	if _, _, why, _ := p.Pick(now, nil); !strings.Contains(why, "nobody") {
		t.Error(why)
	}
}
