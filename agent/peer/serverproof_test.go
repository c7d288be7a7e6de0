package peer

import (
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// Somebody boots his own system on a server and offers a cluster: nobody joins
// it, and what he would have given is not even asked for.
func TestWhenTheServerRunsAStrangersSystemThenNobodyJoins(t *testing.T) {
	p := newProving(t, ours.boot())
	asked := 0
	give := p.server.material
	p.server.material = func() (Material, error) { asked++; return give() }
	join := func() error {
		_, err := p.joiner.meet(p.server.node).JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, "")
		return err
	}
	if err := join(); err != nil || asked != 1 {
		t.Fatalf("the positive twin: %v, asked %d times", err, asked)
	}
	for name, arrange := range map[string]func(){
		"another system": func() { p.server.reboot(theirs.boot()) },
		"another system with our log": func() {
			p.server.reboot(theirs.boot())
			p.server.log = func() ([]byte, error) { return encodeLog(ours.boot()), nil }
		},
		"another machine's TPM": func() {
			other := newMachine(t, p.site, ours.boot())
			p.server.reboot(theirs.boot())
			p.server.log = func() ([]byte, error) { return encodeLog(ours.boot()), nil }
			p.server.tpm = &relayTPM{own: p.server.device, other: other.device, pretend: make([]byte, 32)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			asked = 0
			arrange()
			p.server.start(nil)
			if err := join(); !errors.Is(err, ErrServerUnproven) || asked != 0 {
				t.Errorf("%v, asked %d times; want ErrServerUnproven", err, asked)
			}
		})
	}
	t.Run("positive twin at the end", func(t *testing.T) {
		p.server.reboot(ours.boot())
		p.server.start(nil)
		if err := join(); err != nil {
			t.Error(err)
		}
	})
}

// The server's proof has the bounds of the caller's.
func TestTheServersProofIsFreshAndOfThisConnection(t *testing.T) {
	p := newProving(t, ours.boot())
	c := p.joiner.meet(p.server.node)
	client := p.joiner.peer
	charter := p.joiner.papers.Documents().Charter
	by := prover{node: p.server.id, exporter: c.exporter, key: c.server, public: c.public}
	prove := func() (*challenge, *peerv1.AttestRequest) {
		t.Helper()
		keys, err := c.rpc.Keys(t.Context(), &peerv1.KeysRequest{})
		if err != nil {
			t.Fatal(err)
		}
		ch, m, err := client.challengeTo(p.server.id, keys.GetEkPublic(), keys.GetAkPublic())
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.rpc.Prove(t.Context(), &peerv1.ProveRequest{Challenge: m})
		if err != nil {
			t.Fatal(err)
		}
		return ch, out.GetProof()
	}
	first, proof := prove()
	if _, err := client.judge(by, first, charter, proof); err != nil {
		t.Fatalf("the positive twin: %v", err)
	}
	second, _ := prove()
	// Another answer than the credential's secret tells them apart first; a
	// server that is known has only the nonce.
	second.secret = nil
	if _, err := client.judge(by, second, charter, proof); err == nil || !strings.Contains(err.Error(), "another transcript") {
		t.Errorf("replayed: %v", err)
	}
	other := by
	other.exporter[0] ^= 1
	first.secret = nil
	if _, err := client.judge(other, first, charter, proof); err == nil || !strings.Contains(err.Error(), "another transcript") {
		t.Errorf("of another connection: %v", err)
	}
	p.clock.add(clusterbootstrap.MaxQuoteAge + time.Nanosecond)
	if _, err := client.judge(by, first, charter, proof); err == nil || !strings.Contains(err.Error(), "too old") {
		t.Errorf("stale: %v", err)
	}
	if _, _, err := client.challengeTo(p.joiner.id, first.ek.Raw, first.ak.Raw); err == nil {
		t.Error("a challenge was made for another node's endorsement key")
	}
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); err != nil {
		t.Fatal(err)
	}
	p.joiner.learn(p.site.signCharter(t, func(ch *fleet.Charter) { ch.Images = []fleet.ImageEvidence{theirs.image()} }))
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); !errors.Is(err, ErrServerUnproven) {
		t.Errorf("%v, want ErrServerUnproven: the charter allows this image no longer", err)
	}
}

// Proving takes the TPM's time.
func TestANodeMayNotHaveAnotherProveItselfWithoutEnd(t *testing.T) {
	p := newProving(t, ours.boot())
	p.server.start(func(c *Config) { c.Limits.ProvePerKey = 2 })
	c := p.joiner.meet(p.server.node)
	for i := range 3 {
		_, err := c.rpc.Prove(t.Context(), &peerv1.ProveRequest{Challenge: &peerv1.ChallengeResponse{Nonce: make([]byte, 32)}})
		if (connect.CodeOf(err) == connect.CodeResourceExhausted) != (i == 2) {
			t.Errorf("call %d: %v", i, err)
		}
		if i == 2 && !errors.Is(failed("prove", err), ErrBusy) {
			t.Errorf("%v is no ErrBusy", err)
		}
	}
}
