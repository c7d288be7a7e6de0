package central

import (
	"context"
	"crypto/tls"
	"net/http"
	"testing"
	"time"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// TestWithTPM takes a machine with a software TPM through all of it against
// a centre that serves: challenge, request, approval, certificate, report;
// then the centre is restarted in the middle of another machine's wait.
func TestWithTPM(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	chip := swtpmtest.Start(t, swtpmtest.Options{})
	dir := t.TempDir()
	r := serve(t, dir, nil)
	if _, err := r.manage().ImportRoots(ctx, &musterv1.ImportRootsRequest{Certificates: [][]byte{chip.RootPEM()}, Lab: true}); err != nil {
		t.Fatal(err)
	}
	d, err := device.Open(chip.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	waiting := make(chan client.Progress, 64)
	c, err := client.New(client.Config{
		Site: fleet.SiteConfig{
			Format: fleet.SiteConfigFormat, Image: "recovery", Version: "1", Centre: []string{"https://" + r.addr.Nodes},
			RootsPEM: r.admin.CA, TimeFloor: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		},
		TPM: d, RetryMin: 50 * time.Millisecond, RetryMax: time.Second,
		Hardware: func() fleet.Hardware {
			return fleet.Hardware{Vendor: "QEMU\x1b[2J", Serial: "1", NICs: []fleet.NIC{{Name: "eth0", MAC: "52:54:00:12:34:56", Link: true}}}
		},
		Progress: func(p client.Progress) {
			select {
			case waiting <- p:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan client.Identity, 1)
	failed := make(chan error, 1)
	go func() {
		id, err := c.Enroll(ctx)
		if err != nil {
			failed <- err
			return
		}
		got <- id
	}()
	pending := func() *musterv1.Request {
		for {
			select {
			case <-waiting:
			case err := <-failed:
				t.Fatal(err)
			case <-ctx.Done():
				t.Fatal("no request")
			}
			out, err := r.manage().ListRequests(ctx, &musterv1.ListRequestsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if len(out.Requests) == 1 {
				return out.Requests[0]
			}
		}
	}
	q := pending()
	if q.Identity != musterv1.IdentityTrust_IDENTITY_TRUST_LAB || q.Boot != musterv1.BootTrust_BOOT_TRUST_UNKNOWN || q.Evidence.Hardware.Vendor != "QEMU" {
		t.Errorf("request: %s %s %q", q.Identity, q.Boot, q.Evidence.Hardware.Vendor)
	}
	// The cookie keys survive a restart, and so does the wait.
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	addr := r.addr
	r = serve(t, dir, func(c *Config) { c.Nodes = addr.Nodes })
	if _, err := r.manage().Approve(ctx, &musterv1.ApproveRequest{Id: q.Id, Revision: q.Revision, Site: "lab", CreateSite: true}); err != nil {
		t.Fatal(err)
	}
	var id client.Identity
	select {
	case id = <-got:
	case err := <-failed:
		t.Fatal(err)
	case <-ctx.Done():
		t.Fatal("no certificate")
	}
	if string(id.Node) != q.Node || len(id.Documents) != 1 {
		t.Errorf("identity: %+v", id)
	}
	nodes := musterv1connect.NewNodeServiceClient(c.NodeHTTPClient(id), "https://"+r.addr.Nodes)
	if _, err := nodes.Report(ctx, &musterv1.ReportRequest{}); err != nil {
		t.Error(err)
	}
	// The negative twin: the same certificate with another key.
	other := newMachine(t, "x")
	thief := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.roots, Certificates: []tls.Certificate{{Certificate: id.Certificates, PrivateKey: other.key}}}}}
	if _, err := musterv1connect.NewNodeServiceClient(thief, "https://"+r.addr.Nodes).Report(ctx, &musterv1.ReportRequest{}); err == nil {
		t.Error("a certificate without its key is taken")
	}
	r.sound(t)
}
