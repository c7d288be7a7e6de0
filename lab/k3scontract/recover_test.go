package k3scontract

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// once runs a k3s command that ends by itself and returns its status.
func (n *node) once(t *testing.T, args ...string) (int, string) {
	t.Helper()
	p := n.start(false, nil, args...)
	<-p.done
	return p.codes()[0], p.text()
}

// founderArgs are a founder's flags, as muster keeps them.
func (n *node) founderArgs() []string { return n.serverArgs("--cluster-init", twoLearners) }

// learnersAtOnce is the most learners seen while workers become voters.
func learnersAtOnce(first *node, voters int, limit time.Duration) (most int, err error) {
	err = first.b.within(limit, func() error {
		v, l, err := first.voters()
		most = max(most, l)
		if err != nil || v != voters || l != 0 {
			return fmt.Errorf("%d voters, %d learners: %w", v, l, err)
		}
		return nil
	})
	return most, err
}

// TestRecovery has the rows of a quorum that is lost for good.
func TestRecovery(t *testing.T) {
	long(t)
	b, a, bb, c := site(t)
	uid := a.clusterUID(t)
	promote(a, bb, c)
	a.waitVoters(3, 3*time.Minute)
	bb.ready()
	a.put(t, "kept", "value")

	row(t, "X3", func(t *testing.T) {
		n := b.n("c")
		n.p.kill()
		code, out := n.once(t, n.serverArgs("--server", a.url(), "--cluster-reset")...)
		if code == 0 || !strings.Contains(out, "server") {
			t.Errorf("status %d: %s", code, out)
		}
	})
	a.p.kill()
	bb.p.kill()
	began := time.Now()
	row(t, "X1", func(t *testing.T) {
		code, out := a.once(t, append(a.founderArgs(), "--cluster-reset")...)
		if code != 0 || !strings.Contains(out, "Managed etcd cluster membership has been reset") {
			t.Fatalf("status %d: %s", code, out)
		}
		if _, err := os.Stat(a.data("server/db/reset-flag")); err != nil {
			t.Errorf("reset-flag: %v", err)
		}
	})
	row(t, "X2", func(t *testing.T) {
		code, out := a.once(t, append(a.founderArgs(), "--cluster-reset")...)
		if code == 0 || !strings.Contains(out, "previously reset") {
			t.Errorf("status %d: %s", code, out)
		}
		a.start(true, nil, a.founderArgs()...)
		a.ready()
		b.logf("API back %.1f s after the decision to reset", time.Since(began).Seconds())
		if _, err := os.Stat(a.data("server/db/reset-flag")); !os.IsNotExist(err) {
			t.Errorf("reset-flag after a normal start: %v", err)
		}
		if v, err := a.value("kept"); err != nil || v != "value" {
			t.Errorf("what was written is gone: %q %v", v, err)
		}
		if a.clusterUID(t) != uid {
			t.Error("another cluster")
		}
		if v, l, err := a.voters(); err != nil || v != 1 || l != 0 {
			t.Errorf("%d voters, %d learners: %v", v, l, err)
		}
	})
	row(t, "X4", func(t *testing.T) {
		for _, n := range []*node{bb, c} {
			before, err := a.nodeObject(n.name)
			if err != nil {
				t.Fatal(err)
			}
			n.moveAside(t)
			n.work(a, agentPass)
			b.eventually(n.name+" an agent again", 2*time.Minute, func() error {
				if !strings.Contains(n.p.text(), "agent is up and running") {
					return errors.New("not yet")
				}
				return nil
			})
			a.waitReady(n.name, time.Minute)
			after, err := a.nodeObject(n.name)
			if err != nil || after.Metadata.UID != before.Metadata.UID {
				t.Errorf("Node %s was not kept: %v", n.name, err)
			}
		}
	})
	snap := ""
	row(t, "X5", func(t *testing.T) {
		if out, err := a.run("etcd-snapshot", "save", "--name", "keep", "--token", serverPass); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		files, _ := filepath.Glob(a.data("server/db/snapshots/keep-*"))
		if len(files) != 1 {
			t.Fatalf("%v", files)
		}
		snap = files[0]
		a.put(t, "later", "value")
		a.p.kill()
		code, out := a.once(t, append(a.founderArgs(), "--cluster-reset", "--cluster-reset-restore-path", snap)...)
		if code != 0 {
			t.Fatalf("status %d: %s", code, out)
		}
		a.start(true, nil, a.founderArgs()...)
		a.ready()
		if v, err := a.value("kept"); err != nil || v != "value" {
			t.Errorf("kept: %q %v", v, err)
		}
		if v, err := a.value("later"); err != nil || v != "" {
			t.Errorf("what came after the snapshot is still there: %q %v", v, err)
		}
		if l, _ := filepath.Glob(a.data("server/db/etcd-old-*")); len(l) != 1 {
			t.Errorf("old databases: %v", l)
		}
	})
	row(t, "X8", func(t *testing.T) {
		if _, err := os.Stat(snap); err != nil {
			t.Fatal("no restore came before")
		}
		// After a reset and a restore both, both workers at once.
		promote(a, bb, c)
		most, err := learnersAtOnce(a, 3, 3*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if most != 2 {
			t.Errorf("%d learners at once, want 2", most)
		}
	})
	row(t, "X6", func(t *testing.T) {
		n := bb
		n.p.kill()
		if err := os.RemoveAll(n.data("server")); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"server", "--token", "another-token", "--cluster-reset", "--cluster-reset-restore-path", snap}, n.base()...)
		code, out := n.once(t, args...)
		if code == 0 {
			t.Errorf("status 0: %s", out)
		}
		if _, err := os.Stat(n.data("server/tls/server-ca.key")); err == nil {
			t.Error("the CA key came out of the snapshot with the wrong token")
		}
	})
	row(t, "X7", func(t *testing.T) {
		ca, err := os.ReadFile(a.data("server/tls/server-ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		a.p.kill()
		c.p.kill()
		n := bb
		if err := os.RemoveAll(n.data("server")); err != nil {
			t.Fatal(err)
		}
		code, out := n.once(t, append(n.founderArgs(), "--cluster-reset", "--cluster-reset-restore-path", snap)...)
		if code != 0 {
			t.Fatalf("status %d: %s", code, out)
		}
		n.start(true, nil, n.founderArgs()...)
		n.ready()
		if again, err := os.ReadFile(n.data("server/tls/server-ca.crt")); err != nil || string(again) != string(ca) {
			t.Errorf("another authority: %v", err)
		}
		if v, err := n.value("kept"); err != nil || v != "value" || n.clusterUID(t) != uid {
			t.Errorf("kept: %q %v", v, err)
		}
	})
}

// firstLearner is the first learner in the order of the member list.
func firstLearner(first *node, of ...*node) *node {
	ms, err := first.members()
	if err != nil {
		return nil
	}
	for _, m := range ms {
		for _, n := range of {
			if m.IsLearner && len(m.PeerURLs) == 1 && strings.Contains(m.PeerURLs[0], "//"+n.ip+":") {
				return n
			}
		}
	}
	return nil
}

// TestDeadLearner has the row of the learner that dies for good and is made a
// voter all the same. It is a matter of moments: see TestKill for the series.
func TestDeadLearner(t *testing.T) {
	long(t)
	row(t, "L2", func(t *testing.T) {
		for try := 1; try <= 4; try++ {
			lost := false
			t.Run(fmt.Sprintf("try%d", try), func(t *testing.T) {
				b, a, bb, c := site(t)
				promote(a, bb, c)
				b.eventually("two learners", time.Minute, func() error {
					v, l, err := a.voters()
					if err != nil || v != 1 || l != 2 {
						return fmt.Errorf("%d voters, %d learners: %w", v, l, err)
					}
					return nil
				})
				// Time to copy the log, and not the time to be promoted; and the
				// one that the leader's loop comes to first. Whether the loop comes
				// in between is chance, hence the tries.
				<-time.After(3 * time.Second)
				victim := firstLearner(a, bb, c)
				if victim == nil {
					b.logf("promoted before the kill")
					return
				}
				victim.p.kill()
				b.logf("two learners; %s is dead now", victim.name)
				lost = b.within(90*time.Second, func() error {
					if code, _, err := a.loop("/db/info"); err != nil || code != http.StatusInternalServerError {
						return fmt.Errorf("/db/info %d %w", code, err)
					}
					return nil
				}) == nil
				if !lost {
					v, l, err := a.voters()
					b.logf("quorum kept: %d voters, %d learners, %v", v, l, err)
					return
				}
				b.logf("quorum lost")
				// It stays lost: no retry, restart or time-out brings it back.
				if err := b.within(2*time.Minute, func() error {
					if code, _, err := a.admin(http.MethodGet, "/readyz", nil); err != nil || code != 200 {
						return fmt.Errorf("%d %w", code, err)
					}
					return nil
				}); err == nil {
					t.Error("the API came back by itself: kinder than the real one")
				}
				b.logf("still lost; ends of the founder: %v", a.p.codes())
			})
			if lost {
				return
			}
		}
		t.Error("four dead learners and the quorum never went: kinder than the real one")
	})
}
