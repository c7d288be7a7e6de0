// Package crashtest is for tests that kill a process at a failpoint: it finds
// the program to kill.
package crashtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/muster-edge/muster/internal/failpoint"
)

// Binary is the test program of the package under test with its failpoints
// alive: the one that runs, if it was built so, or else one that is built now,
// once for all tests of the package. The test is skipped where that cannot be,
// and with -short. The program does what the package's TestMain lets it do.
func Binary(t testing.TB) string {
	t.Helper()
	if testing.Short() {
		t.Skip("builds a test binary: left out with -short")
	}
	if failpoint.Enabled {
		return os.Args[0]
	}
	name, err := build()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("the go command is not here to build a binary with failpoints")
	}
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// kept holds the program's file, which has no name any more.
var kept *os.File

// build makes the program. Its name is removed at once, so that nothing is
// left behind however the tests end; children start it by our descriptor.
var build = sync.OnceValues(func() (string, error) {
	if _, err := exec.LookPath("go"); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "crashtest")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	name := filepath.Join(dir, "crash.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "failpoint", "-o", name, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	if kept, err = os.Open(name); err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), kept.Fd()), nil
})
