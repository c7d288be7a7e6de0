package central

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

// crashDir, in the environment, makes this test binary the centre that is
// killed.
const crashDir = "MUSTER_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := crashing(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if spec := os.Getenv(crashServe); spec != "" {
		if err := crashingServer(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if spec := os.Getenv(crashReplica); spec != "" {
		fmt.Fprintln(os.Stderr, approving(spec))
		os.Exit(1)
	}
	os.Exit(pgtest.Main(m))
}

// crashing enrolls machine after machine and prints each step once it is
// acknowledged: "filed a", "approved a", "issued a SERIAL".
func crashing(dir string) error {
	h, err := openHarness(dir, newClock())
	if err != nil {
		return err
	}
	h.scribe = &h.s.scribe
	if os.Getenv(crashWork) == forming {
		return errors.Join(crashingSite(h), h.s.Close())
	}
	if os.Getenv(crashWork) == preApproving {
		return errors.Join(crashingPreApproved(h), h.s.Close())
	}
	for _, name := range []string{"a", "b", "c"} {
		r, err := h.File(context.Background(), servicetest.Filing(name))
		if err != nil {
			return err
		}
		fmt.Println("filed", name)
		if r.State == fleet.RequestPending {
			if err := h.Approve(r.ID, r.Revision); err != nil {
				return err
			}
		}
		fmt.Println("approved", name)
		out, err := h.issueNow(r.ID, fmt.Sprintf("%s%06x", "0a", os.Getpid())+fmt.Sprintf("%x", name))
		if err != nil {
			return err
		}
		fmt.Println("issued", name, out.Serial)
	}
	return h.s.Close()
}

// TestKilledAtEveryStep kills the centre at each named step of each machine,
// starts it again, and looks: what was acknowledged is there, nothing is
// there twice, and the work goes on to the same end.
func TestKilledAtEveryStep(t *testing.T) {
	binary := crashtest.Binary(t)
	for _, point := range []string{
		"file.before-commit", "file.after-commit", "approve.before-commit", "approve.after-commit",
		"issue.after-sign", "issue.before-commit", "issue.after-commit", "store.before-commit", "store.after-commit",
	} {
		times := 3
		if strings.HasPrefix(point, "store.") {
			times = 12
		}
		for n := 1; n <= times; n++ {
			t.Run(fmt.Sprintf("%s,%d", point, n), func(t *testing.T) {
				dir := t.TempDir()
				before, killed := runCrashing(t, binary, dir, fmt.Sprintf("%s,%d", point, n))
				if !killed {
					t.Fatalf("the point was not reached: %v", before)
				}
				look(t, dir, before)
				after, killed := runCrashing(t, binary, dir, "")
				if killed || len(after) != 9 {
					t.Fatalf("the second run said %v", after)
				}
				// A certificate that a machine has got is the one it gets again.
				for _, line := range before {
					if strings.HasPrefix(line, "issued") && !contains(after, line) {
						t.Errorf("%q before, and afterwards %v", line, after)
					}
				}
				look(t, dir, after)
			})
		}
	}
}

func contains(lines []string, want string) bool {
	for _, l := range lines {
		if l == want {
			return true
		}
	}
	return false
}

// look checks the database against what was acknowledged.
func look(t *testing.T, dir string, said []string) {
	t.Helper()
	h, err := openHarness(dir, newClock())
	if err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	h.sound(t)
	requests, err := h.Requests()
	if err != nil {
		t.Fatal(err)
	}
	state := make(map[string]fleet.RequestState)
	for _, r := range requests {
		state[strings.TrimPrefix(r.Evidence.Serial, "S-")] = r.State
	}
	for _, line := range said {
		var verb, name, serial string
		_, _ = fmt.Sscan(line, &verb, &name, &serial) // serial may be missing
		s, there := state[name]
		switch {
		case !there:
			t.Errorf("%q was acknowledged, and the request is lost", line)
		case verb == "approved" && s == fleet.RequestPending, verb == "issued" && s != fleet.RequestIssued:
			t.Errorf("%q was acknowledged, and the request is %s", line, s)
		}
	}
}

// runCrashing runs the centre until it ends or is killed.
func runCrashing(t *testing.T, binary, dir, point string) (said []string, killed bool) {
	t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), crashDir+"="+dir, "MUSTER_FAILPOINT="+point)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for scan := bufio.NewScanner(out); scan.Scan(); {
		said = append(said, scan.Text())
	}
	err = cmd.Wait()
	switch {
	case err == nil:
		return said, false
	case strings.Contains(stderr.String(), "failpoint: killed at"):
		return said, true
	}
	t.Fatalf("%v: %s", err, stderr.String())
	return nil, false
}
