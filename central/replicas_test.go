package central

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/postgres/pgtest"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
)

// crashReplica, in the environment, makes this test binary a replica:
// "DIR URL PREFIX".
const crashReplica = "MUSTER_TEST_CRASH_REPLICA"

// approving files and approves machine after machine, and prints each once
// its approval is acknowledged.
func approving(spec string) error {
	f := strings.Fields(spec)
	h, err := openHarnessOn(f[1], f[0], newClock())
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s-%d", f[2], i)
		r, err := h.File(context.Background(), servicetest.Filing(name))
		if err != nil {
			return err
		}
		if err := h.Approve(r.ID, r.Revision); err != nil {
			return err
		}
		fmt.Println(r.ID)
	}
}

// replicaDirs makes data directories with the same keys.
func replicaDirs(t *testing.T, url string, n int) []string {
	t.Helper()
	var dirs []string
	for i := range n {
		dir := filepath.Join(t.TempDir(), "data")
		if i > 0 {
			if out, err := exec.Command("cp", "-a", dirs[0], dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		h, err := openHarnessOn(url, dir, newClock())
		if err != nil {
			t.Fatal(err)
		}
		if err := h.s.Close(); err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	return dirs
}

// TestReplicaKilled: two processes approve on one database; each is killed in
// the middle again and again. Every approval that was acknowledged is there
// once, with one record of it.
func TestReplicaKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes: left out with -short")
	}
	url := pgtest.URL(t)
	dirs := replicaDirs(t, url, 2)
	var mu sync.Mutex
	acknowledged := make(map[fleet.RequestID]int)
	var wg sync.WaitGroup
	for replica, dir := range dirs {
		wg.Go(func() {
			for life := range 3 {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s r%d-%d", crashReplica, dir, url, replica, life))
				var said strings.Builder
				cmd.Stderr = &said
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Error(err)
					return
				}
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				lines := 5 + 3*life + replica
				for scan := bufio.NewScanner(out); scan.Scan(); {
					mu.Lock()
					acknowledged[fleet.RequestID(scan.Text())]++
					mu.Unlock()
					if lines--; lines == 0 {
						_ = cmd.Process.Kill()
					}
				}
				if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
					t.Errorf("the replica ended by itself: %v: %s", err, said.String())
					return
				}
			}
		})
	}
	wg.Wait()
	h, err := openHarnessOn(url, dirs[0], newClock())
	if err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	h.sound(t)
	records, err := h.records()
	if err != nil {
		t.Fatal(err)
	}
	approvals := make(map[string]int)
	for _, r := range records {
		if r.Kind == audit.RequestApproved {
			approvals[strings.TrimPrefix(r.Object, "request/")]++
		}
	}
	if len(acknowledged) < 40 {
		t.Errorf("only %d approvals were acknowledged", len(acknowledged))
	}
	err = h.s.store.View(context.Background(), func(tx store.Reader) error {
		for id, n := range acknowledged {
			r, err := tx.Request(DefaultTenant, id)
			if err != nil {
				return fmt.Errorf("request %s: %w", id, err)
			}
			if r.State != fleet.RequestApproved || n != 1 || approvals[string(id)] != 1 {
				t.Errorf("request %s is %s, acknowledged %d times, %d records", id, r.State, n, approvals[string(id)])
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	// What was committed and not heard of: at most one per death.
	if extra := len(approvals) - len(acknowledged); extra < 0 || extra > 6 {
		t.Errorf("%d approvals, %d acknowledged", len(approvals), len(acknowledged))
	}
}

// TestReplicasHearEachOther: what one replica does, the other knows.
func TestReplicasHearEachOther(t *testing.T) {
	url := pgtest.URL(t)
	dirs := replicaDirs(t, url, 2)
	var a, b *harness
	for i, h := range []**harness{&a, &b} {
		var err error
		if *h, err = openHarnessOn(url, dirs[i], newClock()); err != nil {
			t.Fatal(err)
		}
		defer (*h).s.Close()
	}
	ctx := context.Background()
	hear := func() {
		t.Helper()
		if err := b.s.follower.catchUp(ctx); err != nil {
			t.Fatal(err)
		}
	}
	r, err := a.File(ctx, servicetest.Filing("m"))
	if err != nil {
		t.Fatal(err)
	}
	hear()
	woken, end := b.s.hub.wait(requestTopic(r.ID))
	defer end()
	if err := a.Approve(r.ID, r.Revision); err != nil {
		t.Fatal(err)
	}
	hear()
	select {
	case <-woken:
	default:
		t.Error("who waits for the request at the other replica was not woken")
	}
	if _, err := a.issueNow(r.ID, "0a01"); err != nil {
		t.Fatal(err)
	}
	if _, there := b.s.index.get(r.Node); there {
		t.Error("the other replica knew before it asked: this test proves nothing")
	}
	hear()
	if e, there := b.s.index.get(r.Node); !there || e.state != fleet.NodeApproved || e.site != "shop-7" || !e.certified {
		t.Errorf("the other replica knows of the node: %+v %v", e, there)
	}
	if b.s.sites.get(DefaultTenant, "shop-7").revision != a.s.sites.get(DefaultTenant, "shop-7").revision {
		t.Error("the replicas know different sites")
	}
	if err := a.Deny(r.Node); err != nil {
		t.Fatal(err)
	}
	// Before it heard: what counts is decided in the transaction.
	if _, err := b.issueNow(r.ID, "0a02"); err == nil {
		t.Error("a denied machine got a certificate at the other replica")
	}
	hear()
	if e, _ := b.s.index.get(r.Node); e.state != fleet.NodeDenied {
		t.Errorf("the other replica takes the denied node for %s", e.state)
	}
	// One that slept too long reads everything.
	b.s.index = newNodeIndex()
	b.s.store.(*watched).nodes = b.s.index
	b.s.follower.last = 1 << 40
	hear()
	if e, there := b.s.index.get(r.Node); !there || e.state != fleet.NodeDenied {
		t.Errorf("after reading everything again: %+v %v", e, there)
	}
	// A backup is restored under it.
	if err := a.s.store.Update(ctx, func(tx store.Tx) error { _, err := tx.RaiseEpoch(); return err }); err != nil {
		t.Fatal(err)
	}
	if err := b.s.follower.catchUp(ctx); !errors.Is(err, errNewLife) {
		t.Errorf("a new epoch: %v", err)
	}
}

// TestReplicaWithOtherKeys: a directory with keys of its own does not serve
// from a database that has others.
func TestReplicaWithOtherKeys(t *testing.T) {
	url := pgtest.URL(t)
	dirs := replicaDirs(t, url, 1)
	fresh := filepath.Join(t.TempDir(), "fresh")
	if _, err := openHarnessOn(url, fresh, newClock()); err == nil || !strings.Contains(err.Error(), "copy ca") {
		t.Errorf("a directory without keys: %v", err)
	}
	if _, err := os.Stat(filepath.Join(fresh, "ca")); err == nil {
		t.Error("it was given keys of its own all the same")
	}
	other := filepath.Join(t.TempDir(), "other")
	h, err := openHarnessOn("", other, newClock())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := openHarnessOn(url, other, newClock()); err == nil || !strings.Contains(err.Error(), "muster.db") {
		t.Errorf("a directory with a database of its own: %v", err)
	}
	if err := os.Remove(filepath.Join(other, databaseFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := openHarnessOn(url, other, newClock()); err == nil || !strings.Contains(err.Error(), "another ca") {
		t.Errorf("a directory with another authority: %v", err)
	}
	// The file in the directory says it, too.
	if err := os.WriteFile(filepath.Join(dirs[0], DatabaseFile), []byte(url+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err = openHarness(dirs[0], newClock())
	if err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	if h.s.follower == nil {
		t.Error("the file database was not read")
	}
}
