package main

import (
	"errors"
	"testing"
)

func TestLives(t *testing.T) {
	for _, c := range []struct {
		name string
		pids []int // 0: no answer
		want bool
		asks int
	}{
		{"when it answers twice then it lives", []int{7, 7}, true, 2},
		{"when it comes up late then it lives", []int{0, 0, 7, 7}, true, 4},
		{"when it was restarted once then it lives", []int{7, 8, 8}, true, 3},
		{"when it never answers then it does not", []int{0, 0, 0, 0}, false, 4},
		{"when it answers as another each time then it does not", []int{7, 8, 9, 10}, false, 4},
		{"when it dies between answers then it does not", []int{7, 0, 7, 0}, false, 4},
	} {
		i := 0
		got := lives(func() (int, error) {
			i++
			if c.pids[i-1] == 0 {
				return 0, errors.New("no answer")
			}
			return c.pids[i-1], nil
		}, func() {})
		if got != c.want || i != c.asks {
			t.Errorf("%s: %v after %d", c.name, got, i)
		}
	}
}
