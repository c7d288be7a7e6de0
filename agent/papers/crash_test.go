package papers

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
)

// The crashing process gets its directory and its keys by the environment.
const (
	crashDir = "PAPERS_CRASH_DIR"
	crashKey = "PAPERS_CRASH_KEY"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := crashing(dir, os.Getenv(crashKey)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crashing learns batch after batch from files, and says which are
// acknowledged.
func crashing(dir, key string) error {
	der, err := hex.DecodeString(key)
	if err != nil {
		return err
	}
	orders, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return err
	}
	ref, err := os.ReadFile(filepath.Join(dir, "me"))
	if err != nil {
		return err
	}
	p, err := Open(Config{Dir: filepath.Join(dir, "papers"), OrdersKeys: []crypto.PublicKey{orders}, Node: fleet.EKHash(Ref(ref)).NodeID(), Key: Ref(ref)})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		var batch [][]byte
		for j := 0; ; j++ {
			b, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("batch-%d-%d", i, j)))
			if errors.Is(err, os.ErrNotExist) {
				break
			} else if err != nil {
				return err
			}
			batch = append(batch, b)
		}
		if len(batch) == 0 {
			return nil
		}
		var r *Refused // what a delegate signed, when the charter is there already
		if _, err := p.Learn(batch); err != nil && !errors.As(err, &r) {
			return err
		}
		fmt.Println("learned", i)
	}
}

// TestKilledAtEveryWrite kills the process at each named line, each time it is
// passed, and looks: what was acknowledged is there, and all goes on to the
// same end.
func TestKilledAtEveryWrite(t *testing.T) {
	binary := crashtest.Binary(t)
	s, me, other := newSite(t), newMember(t), newMember(t)
	delegate := newKey(t)
	batches := [][][]byte{
		{s.charter(delegate), s.admission(me), s.sign(fleet.AdmissionPayload, s.anAdmission(other), delegate)},
		{s.record(me, aRecord("c1", 1, 1, me))},
		{s.admission(other), s.record(me, aRecord("c1", 1, 2, me))},
		{s.sign(fleet.AdmissionPayload, s.anAdmission(newMember(t)), delegate)},
		{s.charter(), s.removal(other)}, // the delegate's word goes
	}
	for _, point := range []string{"before-write", "before-rename", "after-rename", "flushed", "before-remove"} {
		reached := 0
		for n := 1; ; n++ {
			dir := t.TempDir()
			setUp(t, dir, me, batches)
			said, killed := run(t, binary, dir, s.orders, fmt.Sprintf("papers/%s,%d", point, n))
			if !killed {
				break
			}
			reached++
			check(t, s, me, dir, batches, said, fmt.Sprintf("%s,%d", point, n))
			again, killed := run(t, binary, dir, s.orders, "")
			if killed || again != len(batches) {
				t.Fatalf("%s,%d: the second run acknowledged %d", point, n, again)
			}
			p := check(t, s, me, dir, batches, again, "afterwards")
			if d := p.Documents(); len(d.Admissions) != 2 || len(d.Removals) != 1 || len(d.Records) != 1 || d.Records[0].Version != 2 {
				t.Errorf("%s,%d: it ended with %+v", point, n, d)
			}
		}
		if reached == 0 {
			t.Errorf("the point %s was never reached", point)
		}
		t.Logf("%s: killed %d times", point, reached)
	}
}

func setUp(t *testing.T, dir string, me *member, batches [][][]byte) {
	t.Helper()
	files := map[string][]byte{"me": me.ref[:]}
	for i, b := range batches {
		for j, e := range b {
			files[fmt.Sprintf("batch-%d-%d", i, j)] = e
		}
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// check opens the papers and compares them with those of a node that learned
// the acknowledged batches in peace: nothing of these may be missing.
func check(t *testing.T, s *site, me *member, dir string, batches [][][]byte, acknowledged int, what string) *Papers {
	t.Helper()
	peace := s.open(filepath.Join(t.TempDir(), "p"), me)
	for _, b := range batches[:acknowledged] {
		if _, err := peace.Learn(b); err != nil {
			t.Fatal(err)
		}
	}
	p := s.open(filepath.Join(dir, "papers"), me)
	want, got := peace.Documents(), p.Documents()
	merged := want.Merge(got)
	// Nothing acknowledged is lost: what was there is there or was replaced by
	// something newer. A delegate's admission may go with the next charter.
	if want.Charter != nil && (got.Charter == nil || got.Charter.Version.Compare(want.Charter.Version) < 0) {
		t.Errorf("%s: the charter is lost", what)
	}
	for _, r := range want.Records {
		if x, ok := got.Newest(r.UID); !ok || r.Newer(x) {
			t.Errorf("%s: the record of %s is lost", what, r.UID)
		}
	}
	if len(merged.Removals) != len(got.Removals) {
		t.Errorf("%s: a removal is lost", what)
	}
	if got.Charter != nil && want.Charter != nil && got.Charter.Version == want.Charter.Version && len(merged.Admissions) != len(got.Admissions) {
		t.Errorf("%s: an admission is lost", what)
	}
	return p
}

func run(t *testing.T, binary, dir string, orders *ecdsa.PrivateKey, point string) (acknowledged int, killed bool) {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(orders.Public())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), crashDir+"="+dir, crashKey+"="+hex.EncodeToString(der), "MUSTER_FAILPOINT="+point)
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
		if strings.HasPrefix(scan.Text(), "learned") {
			acknowledged++
		}
	}
	err = cmd.Wait()
	switch {
	case err == nil:
		return acknowledged, false
	case strings.Contains(stderr.String(), "failpoint: killed at"):
		return acknowledged, true
	}
	t.Fatalf("%v: %s", err, stderr.String())
	return 0, false
}
