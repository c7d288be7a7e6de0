package scenario

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/host"
)

// byHand: what our times are compared with. The same three namespaces, the
// same k3s, but a script that knows everything beforehand instead of muster:
// a founder, two agents, and both of them made servers at once.
func byHand(ctx context.Context, l *lab.Lab) error {
	s, err := openLAN(l)
	if err != nil {
		return err
	}
	if err := s.addNodes(l.Spec.Nodes); err != nil {
		return err
	}
	for _, b := range s.nodes {
		b.Configure(func(c *host.Config) { c.Services = nil })
	}
	if err := s.on(ctx, s.nodes...); err != nil {
		return err
	}
	// In files, as the secrets on a node must be.
	tokens := map[string]string{}
	for _, name := range []string{"token", "agent-token"} {
		raw := make([]byte, 16)
		_, _ = rand.Read(raw) // does not fail
		tokens[name] = hex.EncodeToString(raw)
		for _, b := range s.nodes {
			if err := os.WriteFile(b.Files()+"/run/"+name, []byte(tokens[name]), 0o600); err != nil {
				return fmt.Errorf("scenario: write tokens: %w", err)
			}
		}
	}
	founder, joiners := s.box(1), s.nodes[1:]
	began := time.Now()
	if err := founder.Start(ctx, s.k3s(founder, "server", "--cluster-init", "--token-file", "/run/token", "--agent-token-file", "/run/agent-token", "--etcd-arg", "max-learners=2")); err != nil {
		return err
	}
	t, err := s.poll(ctx, founder, func(t truth) bool { return t.API && t.ready() >= 1 })
	if err := l.Check("the founder serves", err); err != nil {
		return err
	}
	l.Timing("", "start_to_first_server_s", time.Since(began))
	url := "https://" + oldLAN + "1:6443"
	for _, b := range joiners {
		if err := b.Start(ctx, s.k3s(b, "agent", "--server", url, "--token-file", "/run/agent-token")); err != nil {
			return err
		}
	}
	_, err = s.poll(ctx, founder, func(t truth) bool { return t.ready() == len(s.nodes) })
	if err := l.Check("all nodes are ready", err); err != nil {
		return err
	}
	ready := time.Now()
	l.Timing("", "start_to_all_ready_s", ready.Sub(began))
	for _, b := range joiners[:2] {
		if err := b.Stop(ctx, "k3s-agent"); err != nil {
			return err
		}
		if err := b.Start(ctx, s.k3s(b, "server", "--server", url, "--token-file", "/run/token", "--agent-token-file", "/run/agent-token", "--etcd-arg", "max-learners=2")); err != nil {
			return err
		}
	}
	t, err = s.poll(ctx, founder, func(t truth) bool { return t.API && t.voters() == 3 && len(t.Members) == 3 })
	if err := l.Check("three voters", err); err != nil {
		return err
	}
	l.Timing("", "ready_to_three_voters_s", time.Since(ready))
	l.Timing("", "ready_to_votes_s", time.Since(ready))
	l.Timing("", "policy_wait_s", 0)
	l.Site(func(r *lab.SiteResult) {
		r.Servers, r.Voters, r.Clusters = 3, t.voters(), 1
		r.Remarks = append(r.Remarks, "made by hand, without muster: for comparison")
	})
	return nil
}

// k3s is k3s as a script starts it: the service k3s-server or k3s-agent.
func (s *shop) k3s(b *box, role string, args ...string) host.Service {
	argv := append([]string{s.l.Spec.K3s, role, "--node-name", b.Name(), "--node-ip", oldLAN + fmt.Sprint(b.n)}, args...)
	if !s.l.Spec.StandIn {
		argv = append(argv, "--kubelet-arg", "fail-cgroupv1=false")
	}
	service := host.Service{Name: "k3s-" + role, Argv: argv}
	if s.l.Spec.StandIn {
		service.Env = append(service.Env, "LAB_STANDIN=1")
	}
	return service
}

// poll asks a node's k3s until it fits.
func (s *shop) poll(ctx context.Context, b *box, fits func(truth) bool) (truth, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, formLimit, fmt.Errorf("not within %v", formLimit))
	defer cancel()
	var t truth
	for {
		for _, x := range s.truths(ctx) {
			if x.From == b {
				t = x
			}
		}
		if t.From != nil && fits(t) {
			return t, nil
		}
		if err := sleep.For(ctx, 200*time.Millisecond); err != nil {
			if t.From == nil {
				return t, errors.Join(err, errors.New("it has no datastore"))
			}
			return t, fmt.Errorf("%w; %s", err, t)
		}
	}
}
