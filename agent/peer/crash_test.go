package peer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

// crashDir names the directory of a process that keeps blobs until it is
// killed.
const crashDir = "PEER_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := crashing(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crashing keeps four blobs of one owner and says which are acknowledged.
func crashing(dir string) error {
	s, err := openStore(dir, Limits{}.withDefaults())
	if err != nil {
		return err
	}
	for k := range 4 {
		data := payload(k, 5000)
		b := blobOf(data)
		b.Owner = aNode
		if _, ok := s.find(b.SHA256); !ok {
			in, err := s.begin(b)
			if err != nil {
				return err
			}
			if err := errors.Join(in.write(data), in.commit()); err != nil {
				return err
			}
			in.drop()
		}
		fmt.Println("kept", k)
	}
	return nil
}

// A blob that was acknowledged is there after a kill at any step, until two
// newer ones of its owner are.
func TestKilledWhileABlobIsKept(t *testing.T) {
	binary := crashtest.Binary(t)
	for _, point := range []string{"escrow/after-blob", "escrow/after-meta", "escrow/before-remove"} {
		reached := 0
		for n := 1; ; n++ {
			dir := t.TempDir()
			kept, killed := keepUntilKilled(t, binary, dir, fmt.Sprintf("%s,%d", point, n))
			if !killed {
				break
			}
			reached++
			s, err := openStore(dir, Limits{}.withDefaults())
			if err != nil {
				t.Fatal(err)
			}
			for k := max(0, kept-2); k < kept; k++ {
				data := payload(k, 5000)
				if _, ok := s.find(sha256.Sum256(data)); !ok {
					t.Errorf("%s,%d: blob %d was acknowledged and is lost", point, n, k)
				}
			}
			for _, b := range s.list() {
				if got, err := os.ReadFile(s.path(b.SHA256, blobSuffix)); err != nil || sha256.Sum256(got) != b.SHA256 {
					t.Errorf("%s,%d: a blob is there that is not whole: %v", point, n, err)
				}
			}
			if kept, killed = keepUntilKilled(t, binary, dir, ""); killed || kept != 4 {
				t.Errorf("%s,%d: afterwards %d were kept", point, n, kept)
			}
		}
		if reached == 0 {
			t.Errorf("%s was never reached", point)
		}
		t.Logf("%s: killed %d times", point, reached)
	}
}

func keepUntilKilled(t *testing.T, binary, dir, point string) (kept int, killed bool) {
	t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), crashDir+"="+dir, "MUSTER_FAILPOINT="+point)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	for scan := bufio.NewScanner(&out); scan.Scan(); {
		if strings.HasPrefix(scan.Text(), "kept") {
			kept++
		}
	}
	if err != nil && !strings.Contains(stderr.String(), "failpoint: killed at") {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return kept, err != nil
}
