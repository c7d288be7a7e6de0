package k3s

import (
	"testing"
	"time"
)

// A disk that was too slow for a server when the box had just started is
// looked at again soon; one that was fast enough once a day.
func TestDiskIsMeasuredAgain(t *testing.T) {
	for name, row := range map[string]struct {
		d    *diskSpeed
		now  time.Duration
		want bool
	}{
		"never measured":           {&diskSpeed{}, time.Minute, true},
		"slow, just now":           {&diskSpeed{at: time.Minute, p99: 2 * MaxFsync}, 90 * time.Second, false},
		"slow, a while ago":        {&diskSpeed{at: time.Minute, p99: 2 * MaxFsync}, 4 * time.Minute, true},
		"fast, a while ago":        {&diskSpeed{at: time.Minute, p99: MaxFsync / 50}, 4 * time.Minute, false},
		"fast, more than a day":    {&diskSpeed{at: time.Minute, p99: MaxFsync / 50}, 25 * time.Hour, true},
		"as slow as it may be":     {&diskSpeed{at: time.Minute, p99: MaxFsync}, 4 * time.Minute, false},
		"no measurement succeeded": {&diskSpeed{at: time.Minute}, 4 * time.Minute, false},
	} {
		if got := row.d.due(row.now); got != row.want {
			t.Errorf("%s: measured again: %v, want %v", name, got, row.want)
		}
	}
}
