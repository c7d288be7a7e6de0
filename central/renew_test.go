package central

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

const day = 24 * time.Hour

// box is a machine with a software TPM that talks to a centre.
type box struct {
	r      *running
	chip   *swtpmtest.TPM
	device *device.Device
	client *client.Client
	// clock is the machine's own, off the centre's by this much.
	clock atomic.Int64
	hw    fleet.Hardware
	// from is the address it calls from; "": any.
	from     string
	progress chan client.Progress
}

// timed serves with a clock that the test moves.
func timed(t *testing.T, dir string) (*running, *clock) {
	t.Helper()
	c := newClock()
	c.set(time.Now().UTC().Truncate(time.Second))
	r := serve(t, dir, func(cfg *Config) { cfg.Now = c.now })
	r.clock = c
	return r, c
}

// newBox makes a machine; chip may be one that there is already.
func newBox(t *testing.T, r *running, chip *swtpmtest.TPM) *box {
	t.Helper()
	b := &box{r: r, chip: chip, hw: fleet.Hardware{Vendor: "QEMU", Serial: "1", UUID: "U-1"}, progress: make(chan client.Progress, 256)}
	if b.chip == nil {
		b.chip = swtpmtest.Start(t, swtpmtest.Options{})
	}
	if _, err := r.manage().ImportRoots(t.Context(), &musterv1.ImportRootsRequest{Certificates: [][]byte{b.chip.RootPEM()}, Lab: true}); err != nil {
		t.Fatal(err)
	}
	b.open(t)
	return b
}

func (b *box) open(t *testing.T) {
	t.Helper()
	d, err := device.Open(b.chip.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	b.device = d
	b.client, err = client.New(client.Config{
		Site: fleet.SiteConfig{
			Format: fleet.SiteConfigFormat, Image: "recovery", Version: "1", Centre: []string{"https://" + b.r.addr.Nodes},
			RootsPEM: b.r.admin.CA, TimeFloor: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		},
		TPM: d, RetryMin: 20 * time.Millisecond, RetryMax: 200 * time.Millisecond,
		Hardware: func() fleet.Hardware { return b.hw },
		Now:      func() time.Time { return b.r.clock.now().Add(time.Duration(b.clock.Load())) },
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			d := &net.Dialer{Timeout: 10 * time.Second}
			if b.from != "" {
				d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(b.from)}
			}
			return d.DialContext(ctx, network, addr)
		},
		Progress: func(p client.Progress) {
			select {
			case b.progress <- p:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// enroll runs until there is a certificate or, with an error, until the
// machine is told to wait for a person or that something is wrong.
func (b *box) enroll(t *testing.T) (client.Identity, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for len(b.progress) > 0 {
		<-b.progress
	}
	var id client.Identity
	done := make(chan error, 1)
	go func() {
		var err error
		id, err = b.client.Enroll(ctx)
		done <- err
	}()
	for {
		select {
		case err := <-done:
			return id, err
		case p := <-b.progress:
			if p.Problem || p.Phase == client.PhaseWait && p.State != "issued" && p.State != "approved" {
				cancel()
				<-done
				return id, errors.New(p.State + ": " + p.Text)
			}
		}
	}
}

// admit takes the machine from nothing to its certificate.
func (b *box) admit(t *testing.T) client.Identity {
	t.Helper()
	if _, err := b.enroll(t); err == nil || !strings.HasPrefix(err.Error(), "pending") {
		t.Fatalf("a new machine is not pending: %v", err)
	}
	b.approve(t)
	id, err := b.enroll(t)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// live is the machine's live request.
func (b *box) live(t *testing.T) fleet.Request {
	t.Helper()
	id, err := b.device.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := b.r.Live(t.Context(), DefaultTenant, nodeOfEK(t, id.EKs[0].Public))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (b *box) approve(t *testing.T) {
	t.Helper()
	r := b.live(t)
	if _, err := b.r.manage().Approve(t.Context(), &musterv1.ApproveRequest{Id: string(r.ID), Revision: r.Revision, Site: "lab", CreateSite: true}); err != nil {
		t.Fatal(err)
	}
}

func (b *box) report(id client.Identity) error {
	hc := b.client.NodeHTTPClient(id)
	defer hc.CloseIdleConnections()
	_, err := musterv1connect.NewNodeServiceClient(hc, "https://"+b.r.addr.Nodes).Report(context.Background(), &musterv1.ReportRequest{})
	return err
}

func leafOf(t *testing.T, id client.Identity) *x509.Certificate {
	t.Helper()
	if len(id.Certificates) == 0 {
		t.Fatal("no certificate")
	}
	c, err := x509.ParseCertificate(id.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// renewed counts the certificates of the only node and the records of them.
func (b *box) renewed(t *testing.T) (certificates, records int) {
	t.Helper()
	err := b.r.store.View(t.Context(), func(tx store.Reader) error {
		all, err := tx.IssuedToNode(DefaultTenant, b.live(t).Node)
		certificates = len(all)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	kinds, err := b.r.Audit()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kinds {
		if k == audit.CertificateRenewed {
			records++
		}
	}
	return certificates, records
}

// TestRenew: a node that proves itself again gets a new certificate when a
// third of its life is left, and the same one before.
func TestRenew(t *testing.T) {
	r, clock := timed(t, t.TempDir())
	b := newBox(t, r, nil)
	first := b.admit(t)
	start := clock.now()
	if err := b.report(first); err != nil {
		t.Fatal(err)
	}
	for range 3 { // fresh: no new rows
		id, err := b.client.Renew(t.Context(), first)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(id.Certificates[0], first.Certificates[0]) {
			t.Error("a fresh certificate was renewed")
		}
	}
	if c, n := b.renewed(t); c != 1 || n != 0 {
		t.Errorf("%d certificates, %d renewals", c, n)
	}
	clock.set(start.Add(21 * day))
	second, err := b.client.Renew(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	old, leaf := leafOf(t, first), leafOf(t, second)
	if !leaf.NotAfter.After(old.NotAfter.Add(20*day)) || leaf.SerialNumber.Cmp(old.SerialNumber) == 0 || len(second.Documents) == 0 {
		t.Errorf("renewed: %s to %s, %d documents", leaf.NotBefore, leaf.NotAfter, len(second.Documents))
	}
	for range 3 {
		again, err := b.client.Renew(t.Context(), second)
		if err != nil || !bytes.Equal(again.Certificates[0], second.Certificates[0]) {
			t.Errorf("once more: %v", err)
		}
	}
	if c, n := b.renewed(t); c != 2 || n != 1 {
		t.Errorf("%d certificates, %d renewals", c, n)
	}
	if err := b.report(second); err != nil {
		t.Error(err)
	}
	node, err := r.manage().GetNode(t.Context(), &musterv1.GetNodeRequest{Id: string(second.Node)})
	if err != nil || node.Node.State != musterv1.NodeState_NODE_STATE_ACTIVE || node.Node.Certificate.Serial != leaf.SerialNumber.Text(16) {
		t.Errorf("node: %v, %v", node, err)
	}
	r.sound(t)

	t.Run("when the evidence has changed then it is filed and waits", func(t *testing.T) {
		clock.set(start.Add(45 * day))
		b.hw.Serial = "2"
		if _, err := b.client.Renew(t.Context(), second); !errors.Is(err, client.ErrEnroll) || !strings.Contains(err.Error(), "changed") {
			t.Errorf("other evidence: %v", err)
		}
		if q := b.live(t); q.State != fleet.RequestPending || q.Supersedes != second.Request {
			t.Errorf("the live request: %s, supersedes %q", q.State, q.Supersedes)
		}
		b.hw.Serial = "1"
	})
	if c, n := b.renewed(t); c != 2 || n != 1 {
		t.Errorf("%d certificates, %d renewals", c, n)
	}
	r.sound(t)
}

// TestRenewIsRefused: each reason by which a node gets nothing new.
func TestRenewIsRefused(t *testing.T) {
	r, clock := timed(t, t.TempDir())
	b := newBox(t, r, nil)
	id := b.admit(t)
	start := clock.now()
	clock.set(start.Add(21 * day))
	refused := func(what, word string, err error) {
		t.Helper()
		if !errors.Is(err, client.ErrEnroll) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", what, err)
		}
		if c, n := b.renewed(t); c != 1 || n != 0 {
			t.Errorf("%s: %d certificates, %d renewals", what, c, n)
		}
	}

	// A stolen certificate without its TPM does not even come to Renew; a
	// foreign TPM behind the node's own key does not either way round.
	other := newBox(t, r, nil)
	_, err := other.client.Renew(t.Context(), id)
	if err == nil {
		t.Error("another TPM renews")
	}
	// Statements made for another connection, and none at all.
	m, err := b.client.RenewalFor(t.Context(), make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	hc := b.client.NodeHTTPClient(id)
	rpc := musterv1connect.NewNodeServiceClient(hc, "https://"+r.addr.Nodes)
	if _, err := rpc.Renew(t.Context(), m); connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "not-proven") {
		t.Errorf("a proof from another connection: %v", err)
	}
	if _, err := rpc.Renew(t.Context(), &musterv1.RenewRequest{}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("nothing: %v", err)
	}
	if _, err := rpc.Renew(t.Context(), &musterv1.RenewRequest{Proof: &musterv1.CompleteRequest{EventLog: make([]byte, 3<<20)}}); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("3 MiB: %v", err)
	}
	hc.CloseIdleConnections()
	plain := musterv1connect.NewNodeServiceClient(r.client(), "https://"+r.addr.Nodes)
	if _, err := plain.Renew(t.Context(), m); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("no certificate: %v", err)
	}

	// Today's policy.
	r.s.cfg.LabUnknownBoot = false
	_, err = b.client.Renew(t.Context(), id)
	refused("a stricter policy", "not-allowed", err)
	// The enrollment path is no way round it.
	if _, err := b.enroll(t); err == nil || !strings.Contains(err.Error(), "rules do not allow") {
		t.Errorf("enrolling against a stricter policy: %v", err)
	}
	r.s.cfg.LabUnknownBoot = true

	// An EK root that is trusted no more: the evidence is another one.
	roots, err := filepath.Glob(filepath.Join(r.s.cfg.Data, rootsDir, "*", "*"))
	if err != nil || len(roots) == 0 {
		t.Fatalf("%v, %v", roots, err)
	}
	kept := map[string][]byte{}
	for _, f := range roots {
		kept[f], _ = os.ReadFile(f)
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	clock.set(start.Add(21*day + time.Hour))
	_, err = b.client.Renew(t.Context(), id)
	refused("roots gone", "changed", err)
	if q := b.live(t); q.State != fleet.RequestPending || q.Identity != fleet.IdentityUnverified {
		t.Errorf("the live request is %s, identity %s", q.State, q.Identity)
	}
	for f, c := range kept {
		if err := os.WriteFile(f, c, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	clock.set(start.Add(21*day + 2*time.Hour))
	// The evidence is the old one again, but the approval has not come back.
	_, err = b.client.Renew(t.Context(), id)
	refused("an approval that was superseded", "changed", err)

	// Denied: nothing on either way.
	if err := r.Deny(id.Node); err != nil {
		t.Fatal(err)
	}
	_, err = b.client.Renew(t.Context(), id)
	refused("denied", "denied", err)
	if _, err := b.enroll(t); err == nil || !strings.Contains(err.Error(), "not wanted") {
		t.Errorf("a denied machine enrolls: %v", err)
	}
	r.sound(t)
}

func nodeOfEK(t *testing.T, public []byte) fleet.NodeID {
	t.Helper()
	k, err := tpm.ParsePublic(public)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := fleet.HashEK(k.Public)
	if err != nil {
		t.Fatal(err)
	}
	return ek.NodeID()
}
