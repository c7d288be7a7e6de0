package agent

import (
	"fmt"
	"time"
)

// A machine's clock is a claim of a cheap battery: 1970 and ten years ahead
// both occur. The rules: no reading before the floor is believed; a reading
// after it is used until the centre, authenticated by the pinned root, says
// better; and the centre's word cannot go below the floor either.

// clockSlack is how far off the clock may be before it is corrected.
const clockSlack = 2 * time.Second

// Floor is the later of the image's time floor and the program's build time.
func Floor(site, build time.Time) time.Time {
	if build.After(site) {
		return build
	}
	return site
}

// FirstClock decides what to do with the clock as the kernel took it from the
// RTC: the time to set, and whether to set it at all.
func FirstClock(now, floor time.Time) (set time.Time, adjust bool) {
	if now.Before(floor) {
		return floor, true
	}
	return now, false
}

// ToldClock decides what to do with the time an authenticated centre told.
// adjust is false when the clock is right already. It fails when the told
// time is before the floor: then the centre is wrong, or is not the centre.
func ToldClock(now, told, floor time.Time) (set time.Time, adjust bool, err error) {
	if told.Before(floor) {
		return now, false, fmt.Errorf("agent: set clock: told %s, which is before the floor %s",
			told.UTC().Format(time.RFC3339), floor.UTC().Format(time.RFC3339))
	}
	if d := told.Sub(now); d > clockSlack || d < -clockSlack {
		return told, true, nil
	}
	return now, false, nil
}
