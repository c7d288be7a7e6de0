package fleet_test

import (
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// 2027-01-02 is a Saturday.
func TestUpdateWindows(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse("Mon 2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	night := []fleet.UpdateWindow{{From: "23:00", Minutes: 180}}
	workdays := []fleet.UpdateWindow{{Days: []string{"mon", "wed"}, From: "02:00", Minutes: 60, UTCOffset: 120}}
	for name, row := range map[string]struct {
		policy  fleet.UpdatePolicy
		now     string
		open    bool
		changes string
	}{
		"no window: always":               {fleet.UpdatePolicy{}, "Sat 2027-01-02 12:00", true, ""},
		"paused: never":                   {fleet.UpdatePolicy{Paused: true}, "Sat 2027-01-02 12:00", false, ""},
		"paused in a window: never":       {fleet.UpdatePolicy{Paused: true, Windows: night}, "Sat 2027-01-02 23:30", false, ""},
		"before the night":                {fleet.UpdatePolicy{Windows: night}, "Sat 2027-01-02 22:59", false, "Sat 2027-01-02 23:00"},
		"at its first minute":             {fleet.UpdatePolicy{Windows: night}, "Sat 2027-01-02 23:00", true, "Sun 2027-01-03 02:00"},
		"after midnight":                  {fleet.UpdatePolicy{Windows: night}, "Sun 2027-01-03 01:59", true, "Sun 2027-01-03 02:00"},
		"at its end":                      {fleet.UpdatePolicy{Windows: night}, "Sun 2027-01-03 02:00", false, "Sun 2027-01-03 23:00"},
		"two hours before UTC":            {fleet.UpdatePolicy{Windows: workdays}, "Mon 2027-01-04 00:10", true, "Mon 2027-01-04 01:00"},
		"its Monday begins on our Sunday": {fleet.UpdatePolicy{Windows: []fleet.UpdateWindow{{Days: []string{"mon"}, From: "01:00", Minutes: 30, UTCOffset: 120}}}, "Sun 2027-01-03 23:10", true, "Sun 2027-01-03 23:30"},
		"on another day":                  {fleet.UpdatePolicy{Windows: workdays}, "Tue 2027-01-05 00:10", false, "Wed 2027-01-06 00:00"},
		"a week later":                    {fleet.UpdatePolicy{Windows: []fleet.UpdateWindow{{Days: []string{"sat"}, From: "12:00", Minutes: 1}}}, "Sat 2027-01-02 12:01", false, "Sat 2027-01-09 12:00"},
		"the longer of two that are open": {fleet.UpdatePolicy{Windows: append(night, fleet.UpdateWindow{From: "22:00", Minutes: 600})}, "Sat 2027-01-02 23:30", true, "Sun 2027-01-03 08:00"},
	} {
		open, change := row.policy.Open(at(row.now))
		var want time.Time
		if row.changes != "" {
			want = at(row.changes)
		}
		if open != row.open || !change.Equal(want) {
			t.Errorf("%s: open %v until %s, want %v until %s", name, open, change, row.open, want)
		}
	}
}
