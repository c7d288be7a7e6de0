package fleet

import (
	"slices"
	"strings"
	"time"
)

// UpdatePolicy is when and how the nodes of a site go to another version of
// their stack. Fetching and writing the other slot need no window: they
// disturb nobody.
type UpdatePolicy struct {
	// Paused: nodes fetch, and none restarts into another version.
	Paused bool `json:"paused,omitempty"`
	// Windows are when a node may restart into another version; none: always.
	Windows []UpdateWindow `json:"windows,omitempty"`
	// DrainTimeout is how long the pods of a node may take to leave it, in
	// seconds. After it the node is taken back into service and the update
	// waits, unless DrainForce is set.
	DrainTimeout int64 `json:"drain_timeout_s"`
	// DrainForce restarts the node although pods did not leave in time.
	DrainForce bool `json:"drain_force,omitempty"`
	// RateKbit bounds what one node takes from the centre, in kbit/s; 0: no
	// bound.
	RateKbit int64 `json:"rate_kbit_s,omitempty"`
}

// UpdateWindow is a time that comes again every day or on some days.
type UpdateWindow struct {
	// Days are "mon" to "sun" on which the window begins; none: every day.
	Days []string `json:"days,omitempty"`
	// From is "HH:MM" on the site's clock.
	From string `json:"from"`
	// Minutes is how long it is open, at most a day. It may go over midnight.
	Minutes int64 `json:"minutes"`
	// UTCOffset is how many minutes the site's clock is before UTC: 60 for
	// Central European time. Summer time is not followed: a node has no table
	// of time zones that anybody would keep current.
	UTCOffset int64 `json:"utc_offset_min,omitempty"`
}

// DefaultUpdate is the policy of a site for which nobody chose.
func DefaultUpdate() UpdatePolicy { return UpdatePolicy{DrainTimeout: 300} }

const (
	maxWindows  = 32
	minutesADay = 24 * 60
	maxRateKbit = 100_000_000
)

var weekdays = [...]string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

func (u UpdatePolicy) validate(p *problems) {
	p.check(len(u.Windows) <= maxWindows, "%d update windows, at most %d are allowed", len(u.Windows), maxWindows)
	for _, w := range head(u.Windows, maxWindows) {
		w.validate(p)
	}
	p.check(u.DrainTimeout >= 0 && u.DrainTimeout <= 24*3600, "drain_timeout_s is %d; want 0 to %d", u.DrainTimeout, 24*3600)
	p.check(u.RateKbit >= 0 && u.RateKbit <= maxRateKbit, "rate_kbit_s is %d; want 0 to %d", u.RateKbit, maxRateKbit)
}

// Validate reports all problems of the policy.
func (u UpdatePolicy) Validate() error {
	var p problems
	u.validate(&p)
	return p.err("update policy")
}

func (w UpdateWindow) validate(p *problems) {
	p.check(len(w.Days) <= len(weekdays), "%d days in an update window, a week has %d", len(w.Days), len(weekdays))
	for _, d := range head(w.Days, len(weekdays)) {
		p.check(slices.Contains(weekdays[:], d), "day %q is none of %s", clip(d, 40), strings.Join(weekdays[:], ", "))
	}
	_, good := clockMinutes(w.From)
	p.check(good, "from %q of an update window: want HH:MM", clip(w.From, 40))
	p.check(w.Minutes >= 1 && w.Minutes <= minutesADay, "minutes of an update window is %d; want 1 to %d", w.Minutes, minutesADay)
	p.check(w.UTCOffset >= -14*60 && w.UTCOffset <= 14*60, "utc_offset_min is %d; want %d to %d", w.UTCOffset, -14*60, 14*60)
}

// clockMinutes reads "HH:MM" as minutes after midnight.
func clockMinutes(s string) (int, bool) {
	t, err := time.Parse("15:04", s)
	return t.Hour()*60 + t.Minute(), err == nil && len(s) == 5
}

// Open tells whether a node may restart into another version now, and when
// this changes next; the zero time: never, by the passing of time alone.
func (u UpdatePolicy) Open(now time.Time) (open bool, change time.Time) {
	switch {
	case u.Paused:
		return false, time.Time{}
	case len(u.Windows) == 0:
		return true, time.Time{}
	}
	var ends, begins time.Time
	for _, w := range head(u.Windows, maxWindows) {
		from, good := clockMinutes(w.From)
		if !good {
			continue
		}
		local := now.UTC().Add(time.Duration(w.UTCOffset) * time.Minute)
		midnight := local.Truncate(24 * time.Hour)
		// From yesterday, whose window may go over midnight, to the same day
		// of the next week.
		for day := -1; day <= len(weekdays); day++ {
			at := midnight.AddDate(0, 0, day)
			if len(w.Days) > 0 && !slices.Contains(w.Days, weekdays[at.Weekday()]) {
				continue
			}
			start := at.Add(time.Duration(from) * time.Minute)
			end := start.Add(time.Duration(w.Minutes) * time.Minute)
			start, end = start.Add(now.Sub(local)), end.Add(now.Sub(local))
			if !start.After(now) && now.Before(end) && end.After(ends) {
				ends = end
			}
			if start.After(now) && (begins.IsZero() || start.Before(begins)) {
				begins = start
			}
		}
	}
	if !ends.IsZero() {
		return true, ends.UTC()
	}
	if begins.IsZero() {
		return false, time.Time{}
	}
	return false, begins.UTC()
}
