package agent

import (
	"testing"
	"time"
)

func TestRenewalOf(t *testing.T) {
	start := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	for _, c := range []struct {
		name      string
		life      time.Duration
		jitter    float64
		due, late time.Duration
	}{
		{"when there is no jitter then at a third left", 30 * day, 0, 20 * day, 25 * day},
		{"when the jitter is full then a twelfth later, still early", 30 * day, 1, 22*day + 12*time.Hour, 25 * day},
		{"when the jitter is absurd then it is bounded", 30 * day, 99, 22*day + 12*time.Hour, 25 * day},
		{"when the dates are the wrong way round then at once", -day, 0.5, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := RenewalOf(start, start.Add(c.life), c.jitter)
			if got := r.Due.Sub(start); got != c.due {
				t.Errorf("due after %s, want %s", got, c.due)
			}
			if got := r.Late.Sub(start); got != c.late {
				t.Errorf("late after %s, want %s", got, c.late)
			}
			if r.Late.Before(r.Due) {
				t.Error("late before due")
			}
		})
	}
}
