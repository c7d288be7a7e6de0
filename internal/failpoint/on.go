//go:build failpoint

// Package failpoint lets crash tests stop a process at a named line. In a
// build with the tag "failpoint", MUSTER_FAILPOINT=name or name,n makes the
// process kill itself (SIGKILL: no deferred call runs, as in a power cut) when
// it reaches that point for the nth time.
package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// Enabled tells whether this binary was built for crash tests.
const Enabled = true

var (
	wanted, nth = parse(os.Getenv("MUSTER_FAILPOINT"))
	hits        atomic.Int64
)

func parse(s string) (string, int64) {
	n, count, found := strings.Cut(s, ",")
	if !found {
		return n, 1
	}
	c, err := strconv.ParseInt(count, 10, 64)
	if err != nil || c < 1 {
		fmt.Fprintf(os.Stderr, "failpoint: MUSTER_FAILPOINT=%q: want name or name,n with n >= 1\n", s)
		os.Exit(2)
	}
	return n, c
}

// Hit kills the process if this is the point and the time that was asked for.
func Hit(point string) {
	if wanted == "" || point != wanted || hits.Add(1) != nth {
		return
	}
	fmt.Fprintf(os.Stderr, "failpoint: killed at %s\n", point)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}
