package servicetest

import "testing"

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) Harness { return NewMemory() })
}
