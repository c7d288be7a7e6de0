package central

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/escrow"
)

// TestNodeCallsOverTLS: what a forming site calls, through the real endpoint,
// with the certificate the node got; and nobody else gets an answer.
func TestNodeCallsOverTLS(t *testing.T) {
	r := serve(t, t.TempDir(), nil)
	if err := r.s.store.Update(context.Background(), func(tx store.Tx) error { return addTestImage(tx, time.Now(), "slot", "1") }); err != nil {
		t.Fatal(err)
	}
	req, cert, issued := r.enroll(t, newMachine(t, "a"))
	if len(issued.Documents) != 2 {
		t.Errorf("%d documents come with the certificate, want admission and charter", len(issued.Documents))
	}
	private, public, err := escrow.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.s.trustEscrowKey(context.Background(), testCaller, public, "test"); err != nil {
		t.Fatal(err)
	}
	snapshot := make([]byte, 3<<20)
	rand.Read(snapshot)
	sum := sha256.Sum256(snapshot)
	var blob bytes.Buffer
	if _, err := escrow.SealSnapshot(&blob, public, escrow.Header{Tenant: DefaultTenant, Site: "lab", Node: req.Node, Cluster: "c-1", Taken: time.Now().UTC()},
		escrow.Contents{Name: "etcd", Size: int64(len(snapshot)), SHA256: hex.EncodeToString(sum[:]), Token: "K10x"}, bytes.NewReader(snapshot)); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(musterv1connect.NodeServiceClient) error{
		"documents": func(c musterv1connect.NodeServiceClient) error {
			out, err := c.Documents(context.Background(), &musterv1.DocumentsRequest{Site: "lab"})
			if err == nil && (out.Site != "lab" || len(out.Envelopes) != 2) {
				t.Errorf("%d documents of %q", len(out.Envelopes), out.Site)
			}
			return err
		},
		"founding": func(c musterv1connect.NodeServiceClient) error {
			out, err := c.AskFounding(context.Background(), &musterv1.AskFoundingRequest{Site: "lab", Uid: "c-1"})
			if err == nil && out.Node != string(req.Node) {
				t.Errorf("founding: %v", out)
			}
			return err
		},
		"a report at its limits": func(c musterv1connect.NodeServiceClient) error {
			q := &musterv1.ReportRequest{Cluster: &musterv1.ClusterReport{
				Role: "server", Reason: strings.Repeat("x", 4096), Record: make([]byte, maxRecord), EscrowOffer: make([]byte, maxOffer),
			}}
			for range maxOutcomes {
				q.Outcomes = append(q.Outcomes, &musterv1.OrderOutcome{Id: "o-1", Text: strings.Repeat("x", 512)})
			}
			_, err := c.Report(context.Background(), q)
			return err
		},
		"escrow": func(c musterv1connect.NodeServiceClient) error {
			stream, err := c.PutEscrow(context.Background())
			if err != nil {
				return err
			}
			whole := sha256.Sum256(blob.Bytes())
			// What the centre says comes with the answer, not with a send.
			_ = stream.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Header{Header: &musterv1.EscrowHeader{Sha256: whole[:], Size: int64(blob.Len())}}})
			for rest := blob.Bytes(); len(rest) > 0; {
				n := min(len(rest), maxPiece)
				if stream.Send(&musterv1.PutEscrowRequest{Part: &musterv1.PutEscrowRequest_Data{Data: rest[:n]}}) != nil {
					break
				}
				rest = rest[n:]
			}
			out, err := stream.CloseAndReceive()
			if err == nil && out.Id != fleet.EscrowID(whole) {
				t.Errorf("escrow: %v", out)
			}
			return err
		},
		"handover": func(c musterv1connect.NodeServiceClient) error {
			stream, err := c.GetHandover(context.Background(), &musterv1.GetHandoverRequest{Id: fleet.EscrowID([32]byte{1})})
			if err != nil {
				return err
			}
			if stream.Receive() {
				t.Error("something was handed over")
			}
			if connect.CodeOf(stream.Err()) == connect.CodeNotFound {
				return nil // there is none: the call itself got through
			}
			return stream.Err()
		},
	}
	client := func(cert ...tls.Certificate) musterv1connect.NodeServiceClient {
		return musterv1connect.NewNodeServiceClient(r.client(cert...), "https://"+r.addr.Nodes)
	}
	for name, call := range calls {
		if err := call(client()); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s without a certificate: %v", name, err)
		}
	}
	for name, call := range calls {
		if err := call(client(cert)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	big := &musterv1.ReportRequest{Image: strings.Repeat("x", maxReport+1)}
	if _, err := client(cert).Report(context.Background(), big); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a report beyond its limit: %v", err)
	}
	people := r.manage()
	stream, err := people.FetchEscrow(context.Background(), &musterv1.FetchEscrowRequest{Id: fleet.EscrowID(sha256.Sum256(blob.Bytes()))})
	if err != nil {
		t.Fatal(err)
	}
	var back, plain bytes.Buffer
	for stream.Receive() {
		back.Write(stream.Msg().GetData())
	}
	if _, _, err := escrow.OpenSnapshot(&plain, &back, private); err != nil || !bytes.Equal(plain.Bytes(), snapshot) {
		t.Errorf("what came back: %v, %v", stream.Err(), err)
	}
	if _, err := r.s.deny(context.Background(), testCaller, string(req.Node), 0, "stolen"); err != nil {
		t.Fatal(err)
	}
	for name, call := range calls {
		if err := call(client(cert)); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s of a denied node: %v", name, err)
		}
	}
}
