package central

import (
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pxe"
)

func TestBootStanding(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	installed := fleet.SystemReport{Slot: fleet.SlotA, Image: "edge@1", State: fleet.SystemCurrent}
	for name, c := range map[string]struct {
		facts bootFacts
		want  pxe.Standing
		say   string
	}{
		"nothing installed":             {bootFacts{now: now}, pxe.Unknown, "no system"},
		"in recovery":                   {bootFacts{now: now, system: fleet.SystemReport{Slot: fleet.SlotRecovery}}, pxe.Unknown, "no system"},
		"installed and healthy":         {bootFacts{now: now, system: installed, seen: now.Add(-time.Minute)}, pxe.Healthy, "edge@1, slot a"},
		"told to recover":               {bootFacts{now: now, system: installed, ordered: fleet.OrderRecover}, pxe.Recover, "an order (recover)"},
		"has just begun to ask":         {bootFacts{now: now, system: installed, seen: now.Add(-time.Hour), asked: now}, pxe.Healthy, "slot a"},
		"its disk takes its time":       {bootFacts{now: now, system: installed, seen: now.Add(-time.Hour), asked: now.Add(-deafAfter + time.Second)}, pxe.Healthy, "slot a"},
		"its disk does not start":       {bootFacts{now: now, system: installed, seen: now.Add(-time.Hour), asked: now.Add(-deafAfter)}, pxe.Recover, "its disk does not start"},
		"was heard of since it asked":   {bootFacts{now: now, system: installed, seen: now.Add(-time.Minute), asked: now.Add(-time.Hour)}, pxe.Healthy, "slot a"},
		"new, and asks for a long time": {bootFacts{now: now, asked: now.Add(-time.Hour)}, pxe.Unknown, "no system"},
	} {
		if got, why := c.facts.decide(); got != c.want || !strings.Contains(why, c.say) {
			t.Errorf("%s: %s, %q; want %s, %q", name, got, why, c.want, c.say)
		}
	}
}

func TestAsking(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	var a asking
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for i, c := range []struct{ seen, now, want time.Time }{
		{at(-time.Hour), at(0), at(0)},
		{at(-time.Hour), at(time.Minute), at(0)},                          // asks again: since the first time
		{at(2 * time.Minute), at(time.Hour), at(time.Hour)},               // was heard of meanwhile
		{at(2 * time.Minute), at(time.Hour + time.Minute), at(time.Hour)}, // and asks again
		{at(2 * time.Minute), at(30 * time.Hour), at(30 * time.Hour)},     // days later
		{at(31 * time.Hour), at(32 * time.Hour), at(32 * time.Hour)},      // heard of again
		{time.Time{}, at(32*time.Hour + time.Second), at(32 * time.Hour)}, // never seen counts as asked
	} {
		if got := a.first("n-a", c.seen, c.now); !got.Equal(c.want) {
			t.Errorf("%d: since %s, want %s", i, got, c.want)
		}
	}
	if got := a.first("n-b", time.Time{}, at(0)); !got.Equal(at(0)) {
		t.Error("two machines are mixed up")
	}
	for i := range 2 * maxAsked {
		a.first(fleet.NodeID(rune(i)), time.Time{}, at(0))
	}
	if len(a.since) > maxAsked {
		t.Errorf("%d are remembered", len(a.since))
	}
}
