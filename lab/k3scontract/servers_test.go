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

// site is one founder and two workers that joined with a bootstrap token of
// minutes: what a promotion starts from.
func site(t *testing.T, more ...string) (*bench, *node, *node, *node) {
	t.Helper()
	b := newBench(t, append([]string{"a", "b", "c"}, more...)...)
	a := b.n("a")
	a.found()
	tok := a.bootstrapToken(t)
	for _, w := range []string{"b", "c"} {
		b.n(w).work(a, tok)
	}
	for _, w := range []string{"a", "b", "c"} {
		a.waitReady(w, time.Minute)
	}
	b.logf("one server, two workers")
	return b, a, b.n("b"), b.n("c")
}

// promote changes the role of workers in place, all at once.
func promote(first *node, workers ...*node) {
	first.b.t.Helper()
	for _, w := range workers {
		w.p.term()
	}
	for _, w := range workers {
		w.serve(first)
	}
}

// TestPromotion has the rows of the good way to three servers, and those that
// three servers can show.
func TestPromotion(t *testing.T) {
	b, a, bb, c := site(t, "d")
	uids := map[string]string{}
	for _, n := range []string{"b", "c"} {
		o, err := a.nodeObject(n)
		if err != nil {
			t.Fatal(err)
		}
		uids[n] = o.Metadata.UID
	}
	began := time.Now()
	promote(a, bb, c)
	row(t, "J4", func(t *testing.T) {
		b.eventually("a learner", time.Minute, func() error {
			ms, err := a.members()
			if err != nil {
				return err
			}
			for _, m := range ms {
				if m.IsLearner {
					return nil
				}
			}
			return fmt.Errorf("%+v", ms)
		})
		for _, n := range []*node{bb, c} {
			if code, _, err := n.loop("/readyz"); err == nil && code == http.StatusOK {
				t.Errorf("%s answers its API as a learner", n.name)
			}
		}
	})
	row(t, "J1", func(t *testing.T) {
		probes, gaps := 0, 0
		b.eventually("three voters", 3*time.Minute, func() error {
			probes++
			if code, _, err := a.admin(http.MethodGet, "/readyz", nil); err != nil || code != 200 {
				gaps++
			}
			v, l, err := a.voters()
			if err != nil || v != 3 || l != 0 {
				return fmt.Errorf("%d voters, %d learners: %w", v, l, err)
			}
			return nil
		})
		b.logf("three voters %.1f s after the role change; %d of %d probes of the founder's API failed", time.Since(began).Seconds(), gaps, probes)
		for _, n := range []*node{bb, c} {
			n.ready()
			o, err := n.nodeObject(n.name)
			if err != nil || o.Metadata.UID != uids[n.name] {
				t.Errorf("Node %s was not kept: %v", n.name, err)
			}
			if n.p.codes() != nil {
				b.logf("%s ended with %v on its way", n.name, n.p.codes())
			}
		}
	})
	row(t, "B2", func(t *testing.T) {
		d := b.n("d")
		d.work(a, agentPass)
		a.waitReady("d", time.Minute)
		b.eventually("three addresses", time.Minute, func() error {
			code, ep, err := a.admin(http.MethodGet, "/api/v1/namespaces/default/endpoints/kubernetes", nil)
			if err != nil || code != 200 {
				return fmt.Errorf("%d %w", code, err)
			}
			list, err := os.ReadFile(d.data("agent/etc/k3s-agent-load-balancer.json"))
			if err != nil {
				return err
			}
			for _, n := range []*node{a, bb, c} {
				if !strings.Contains(ep, `"`+n.ip+`"`) || !strings.Contains(string(list), n.ip+":6443") {
					return fmt.Errorf("%s missing in %s", n.ip, list)
				}
			}
			return nil
		})
	})
	row(t, "L1", func(t *testing.T) {
		c.p.kill()
		// The killed one may have led: the others need an election.
		b.eventually("the API without one voter", time.Minute, func() error {
			if code, _, err := a.admin(http.MethodGet, "/readyz", nil); err != nil || code != 200 {
				return fmt.Errorf("%d %w", code, err)
			}
			return nil
		})
		a.put(t, "written-with-two", "yes")
	})
	row(t, "J5", func(t *testing.T) {
		long(t)
		d := b.n("d")
		d.p.term()
		d.serve(a)
		b.eventually("the newcomer to be kept waiting", 2*time.Minute, func() error {
			if !strings.Contains(d.p.text(), "Waiting for other members") && !strings.Contains(d.p.text(), "unhealthy") {
				return errors.New("no word of it")
			}
			return nil
		})
		if ms, err := a.members(); err != nil || len(ms) != 3 {
			t.Errorf("members %v %v", ms, err)
		}
		a.must(t, http.MethodDelete, "/api/v1/nodes/c", nil, 200)
		b.eventually("d a voter in the place of c", 3*time.Minute, func() error {
			ms, err := a.members()
			if err != nil {
				return err
			}
			names := ""
			for _, m := range ms {
				names += fmt.Sprintf(" %s learner=%v", m.Name, m.IsLearner)
				if m.Name == d.memberName() && !m.IsLearner && len(ms) == 3 {
					return nil
				}
			}
			return errors.New(names)
		})
		d.ready()
	})
	row(t, "R1", func(t *testing.T) {
		long(t)
		gone := c.memberName()
		ms, err := a.members()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ms {
			if m.Name == gone {
				t.Errorf("%s is still a member after its Node was deleted", gone)
			}
		}
		if _, err := a.nodeObject("c"); !errors.Is(err, errNoNode) {
			t.Errorf("Node c: %v", err)
		}
	})
	row(t, "B1", func(t *testing.T) {
		long(t)
		c.moveAside(t)
		w := c.work(a, agentPass)
		bb.waitReady("c", time.Minute)
		b.eventually("the whole list at the agent", time.Minute, func() error {
			list, err := os.ReadFile(c.data("agent/etc/k3s-agent-load-balancer.json"))
			if err != nil || strings.Count(string(list), ":6443") < 4 { // three, and the URL
				return fmt.Errorf("%s %w", list, err)
			}
			return nil
		})
		a.p.kill()
		w.term()
		again := c.work(a, agentPass)
		b.eventually("the agent to run without its server", 2*time.Minute, func() error {
			if !strings.Contains(again.text(), "agent is up and running") {
				return errors.New("not yet")
			}
			return nil
		})
	})
	row(t, "S6", func(t *testing.T) {
		long(t)
		bb.p.term()
		bb.serve(a) // a is dead
		a.start(true, nil, a.serverArgs("--cluster-init", twoLearners)...)
		bb.ready()
	})
}

// TestRemoval has the rows about members that are removed while they live.
func TestRemoval(t *testing.T) {
	long(t)
	b, a, bb, c := site(t)
	promote(a, bb, c)
	a.waitVoters(3, 3*time.Minute)
	bb.ready()
	c.ready()
	old := c.memberName()
	row(t, "R2", func(t *testing.T) {
		// As systemd would, k3s would come back at once: here it must not.
		c.p.mu.Lock()
		c.p.stop = true
		c.p.mu.Unlock()
		b.eventually("the member's name on the Node", time.Minute, func() error {
			o, err := a.nodeObject("c")
			if err != nil || o.Metadata.Annotations["etcd.k3s.cattle.io/node-name"] != old {
				return fmt.Errorf("%w", err)
			}
			return nil
		})
		a.must(t, http.MethodPatch, "/api/v1/nodes/c", map[string]any{"metadata": map[string]any{"annotations": map[string]any{"etcd.k3s.cattle.io/remove": "true"}}}, 200)
		b.eventually("removed-node-name", 2*time.Minute, func() error {
			o, err := a.nodeObject("c")
			if err != nil {
				return err
			}
			an := o.Metadata.Annotations
			if an["etcd.k3s.cattle.io/removed-node-name"] != old || an["etcd.k3s.cattle.io/node-name"] != "" {
				return fmt.Errorf("%v", an)
			}
			return nil
		})
		a.waitVoters(2, time.Minute)
		b.eventually("the tombstone", time.Minute, func() error {
			_, err := os.Stat(c.data("server/db/etcd/tombstone"))
			return err
		})
		c.p.term()
	})
	row(t, "R4", func(t *testing.T) {
		p := c.start(false, nil, c.serverArgs(twoLearners)...)
		<-p.done
		if code := p.codes()[0]; code == 0 || !strings.Contains(p.text(), "tombstone") {
			t.Errorf("status %d", code)
		}
	})
	row(t, "R3", func(t *testing.T) {
		c.serve(a)
		a.waitVoters(3, 3*time.Minute)
		if c.memberName() == old {
			t.Error("the same member again")
		}
		if l, _ := filepath.Glob(c.data("server/db/etcd-backup-*")); len(l) != 1 {
			t.Errorf("backups %v", l)
		}
	})
}

// TestSerial has the rows of joins with max-learners left at its default.
func TestSerial(t *testing.T) {
	long(t)
	b := newBench(t, "a", "b", "c")
	a := b.n("a")
	a.start(true, nil, a.serverArgs("--cluster-init")...)
	a.ready()
	row(t, "J3", func(t *testing.T) {
		c := b.n("c")
		p := c.start(false, nil, c.serverArgs("--server", a.url(), "--cluster-cidr", "10.99.128.0/17")...)
		<-p.done
		if !strings.Contains(p.text(), "critical configuration value mismatch") {
			t.Errorf("it ended with %v and without a word of it", p.codes())
		}
		if ms, err := a.members(); err != nil || len(ms) != 1 {
			t.Errorf("members %v %v", ms, err)
		}
		if err := os.RemoveAll(c.data("server")); err != nil {
			t.Fatal(err)
		}
	})
	row(t, "J2", func(t *testing.T) {
		for _, n := range []string{"b", "c"} {
			b.n(n).start(true, nil, b.n(n).serverArgs("--server", a.url())...)
		}
		most := 0
		b.eventually("three voters", 5*time.Minute, func() error {
			v, l, err := a.voters()
			most = max(most, l)
			if err != nil || v != 3 {
				return fmt.Errorf("%d voters, %d learners: %w", v, l, err)
			}
			return nil
		})
		if most > 1 {
			t.Errorf("%d learners at once", most)
		}
	})
	row(t, "H4", func(t *testing.T) {
		b.n("b").p.kill()
		b.n("c").p.kill()
		b.eventually("503 from the API, 500 from /db/info", 2*time.Minute, func() error {
			api, _, err := a.admin(http.MethodGet, "/api/v1/nodes", nil)
			if err != nil {
				return err
			}
			info, body, err := a.loop("/db/info")
			if err != nil {
				return err
			}
			ping, pong, err := a.loop("/ping")
			if err != nil || api != 503 || info != 500 || !strings.Contains(body, "MemberList") || ping != 200 || pong != "pong" {
				return fmt.Errorf("API %d, /db/info %d %s, /ping %d %s %w", api, info, body, ping, pong, err)
			}
			return nil
		})
	})
}

// TestTwoProcesses has the row about an agent that is not gone when the server
// of the same node starts.
func TestTwoProcesses(t *testing.T) {
	long(t)
	b, a, bb, _ := site(t)
	row(t, "S4", func(t *testing.T) {
		agent := bb.p
		server := bb.serve(a) // the agent still runs
		defer agent.kill()
		b.eventually("a voter that ends with status 0", 3*time.Minute, func() error {
			if len(server.codes()) == 0 || !strings.Contains(server.text(), "6444") {
				return fmt.Errorf("ends %v", server.codes())
			}
			return nil
		})
		for _, code := range server.codes() {
			if code != 0 {
				t.Errorf("ended with %v, want 0", server.codes())
			}
		}
		if !strings.Contains(server.text(), "address already in use") {
			t.Error("no word of the address in use")
		}
		server.kill()
		if !agent.running() {
			t.Error("the agent is gone")
		}
		b.eventually("the quorum to be gone", time.Minute, func() error {
			if code, _, err := a.loop("/db/info"); err != nil || code != 500 {
				return fmt.Errorf("/db/info %d %w", code, err)
			}
			return nil
		})
	})
}
