package central

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/audit"
	"github.com/muster-edge/muster/internal/failpoint/crashtest"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// crashServe, in the environment, makes this test binary a whole centre on
// the addresses that follow the directory: "DIR OPERATORS NODES".
const crashServe = "MUSTER_TEST_CRASH_SERVE"

// crashingServer serves until its standard input ends.
func crashingServer(spec string) error {
	f := strings.Fields(spec)
	if len(f) != 3 {
		return fmt.Errorf("%s=%q", crashServe, spec)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	s, err := New(ctx, Config{
		Data: f[0], Operators: f[1], Nodes: f[2], Metrics: "127.0.0.1:0", LabUnknownBoot: true, LabUnverified: true,
		Ready: func(Addresses) { fmt.Println("ready") },
	})
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

// centreProcess is one life of the centre.
type centreProcess struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr *bytes.Buffer
	ended  chan error
}

func startCentre(binary, spec, point string) (*centreProcess, error) {
	p := &centreProcess{cmd: exec.Command(binary), stderr: new(bytes.Buffer), ended: make(chan error, 1)}
	p.cmd.Env = append(os.Environ(), crashServe+"="+spec, "MUSTER_FAILPOINT="+point)
	p.cmd.Stderr = p.stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.stdin = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	_, err = io.ReadFull(out, make([]byte, len("ready\n")))
	go func() {
		_, _ = io.Copy(io.Discard, out)
		p.ended <- p.cmd.Wait()
	}()
	if err != nil {
		<-p.ended
		return nil, fmt.Errorf("the centre does not start: %s", p.stderr)
	}
	return p, nil
}

func (p *centreProcess) stop(t *testing.T) {
	t.Helper()
	_ = p.stdin.Close()
	if err := <-p.ended; err != nil {
		t.Errorf("the centre ended with %v: %s", err, p.stderr)
	}
}

// freeAddress is on loopback, below the range of ports given to clients, so
// that nobody takes it between two lives of a centre.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000))
		if l, err := net.Listen("tcp", address); err == nil {
			_ = l.Close()
			return address
		}
	}
	t.Fatal("no free port")
	return ""
}

// TestCentreKilledDuringEnrollment kills the whole centre at each named step
// while a real client with a TPM enrolls against it, and starts it again. The
// client and the operator only repeat what was not answered; in the end there
// is one request, one decision, one certificate, and a whole audit chain.
func TestCentreKilledDuringEnrollment(t *testing.T) {
	binary := crashtest.Binary(t)
	for _, point := range []string{
		"enroll/complete/before-file", "file.before-commit", "file.after-commit", "enroll/complete/after-file",
		"approve.before-commit", "approve.after-commit",
		"enroll/collect/before-issue", "issue.after-sign", "issue.before-commit", "issue.after-commit", "enroll/collect/after-issue",
	} {
		t.Run(strings.ReplaceAll(point, "/", "."), func(t *testing.T) { enrollWhileKilled(t, binary, point) })
	}
}

func enrollWhileKilled(t *testing.T, binary, point string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	chip := swtpmtest.Start(t, swtpmtest.Options{})
	dir := t.TempDir()
	local, err := OpenLocal(ctx, dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := local.ImportRoots(ctx, [][]byte{chip.RootPEM()}, true, "test", time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := local.Close(); err != nil {
		t.Fatal(err)
	}
	operators, nodes := freeAddress(t), freeAddress(t)
	spec := strings.Join([]string{dir, operators, nodes}, " ")
	centre, err := startCentre(binary, spec, point)
	if err != nil {
		t.Fatal(err)
	}
	// Whoever watches the centre starts it again when it is killed, once.
	type life struct {
		*centreProcess
		err error
	}
	lives := make(chan life, 1)
	go func() {
		<-centre.ended
		if said := centre.stderr.String(); !strings.Contains(said, "failpoint: killed at "+point) {
			lives <- life{err: fmt.Errorf("the centre was not killed at %s: %s", point, said)}
			return
		}
		p, err := startCentre(binary, spec, "")
		lives <- life{p, err}
	}()

	who := accessOf(t, dir)
	d, err := device.Open(chip.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	c, err := client.New(client.Config{
		Site: fleet.SiteConfig{
			Format: fleet.SiteConfigFormat, Image: "recovery", Version: "1", Centre: []string{"https://" + nodes},
			RootsPEM: who.admin.CA, TimeFloor: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		},
		TPM: d, RetryMin: 20 * time.Millisecond, RetryMax: 200 * time.Millisecond,
		Hardware: func() fleet.Hardware { return fleet.Hardware{Serial: "S1"} },
	})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan client.Identity, 1)
	go func() {
		if id, err := c.Enroll(ctx); err == nil {
			got <- id
		}
	}()
	// The operator approves what waits, again and again until it is told that
	// this has happened.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var id client.Identity
	for id.Node == "" {
		select {
		case id = <-got:
		case <-tick.C:
			out, err := who.manage().ListRequests(ctx, &musterv1.ListRequestsRequest{})
			if err != nil {
				continue
			}
			for _, q := range out.Requests {
				if q.State == musterv1.RequestState_REQUEST_STATE_PENDING {
					_, _ = who.manage().Approve(ctx, &musterv1.ApproveRequest{Id: q.Id, Revision: q.Revision, Site: "lab", CreateSite: true})
				}
			}
		case <-ctx.Done():
			t.Fatal("the machine got no certificate")
		}
	}
	select {
	case second := <-lives:
		if second.err != nil {
			t.Fatal(second.err)
		}
		second.stop(t)
	case <-time.After(10 * time.Second):
		centre.stop(t)
		t.Fatalf("the centre never came to %s", point)
	}
	onceAndWhole(t, ctx, dir, id)
}

// accessOf reads what the centre wrote for its administrator.
func accessOf(t *testing.T, dir string) *running {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, AdminFile))
	if err != nil {
		t.Fatal(err)
	}
	r := &running{roots: x509.NewCertPool()}
	if err := yaml.Unmarshal(b, &r.admin); err != nil {
		t.Fatal(err)
	}
	r.roots.AppendCertsFromPEM([]byte(r.admin.CA))
	return r
}

// onceAndWhole looks at a centre at rest.
func onceAndWhole(t *testing.T, ctx context.Context, dir string, id client.Identity) {
	t.Helper()
	local, err := OpenLocal(ctx, dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	counts := map[audit.Kind]int{}
	if err := local.Audit(ctx, func(r fleet.AuditRecord) error { counts[audit.Kind(r.Kind)]++; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []audit.Kind{audit.RequestFiled, audit.RequestApproved, audit.CertificateIssued, audit.AdmissionIssued} {
		if counts[kind] != 1 {
			t.Errorf("%s stands %d times in the audit log, want once", kind, counts[kind])
		}
	}
	if _, bad, err := local.VerifyAudit(ctx); err != nil || bad != nil {
		t.Errorf("audit: %v %v", bad, err)
	}
	if len(id.Certificates) == 0 || len(id.Documents) != 1 {
		t.Errorf("the machine has %d certificates and %d documents", len(id.Certificates), len(id.Documents))
	}
}
