package central

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet"
)

// countingStore counts transactions.
type countingStore struct {
	store.Store
	n atomic.Int64
}

func (c *countingStore) View(ctx context.Context, f func(store.Reader) error) error {
	c.n.Add(1)
	return c.Store.View(ctx, f)
}

func (c *countingStore) Update(ctx context.Context, f func(store.Tx) error) error {
	c.n.Add(1)
	return c.Store.Update(ctx, f)
}

// reporter enrolls a machine and returns what reports as it.
func reporter(t testing.TB) (*harness, *countingStore, func() (*musterv1.ReportResponse, error)) {
	t.Helper()
	h := newHarness(t, t.TempDir())
	counting := &countingStore{Store: h.s.store}
	h.s.store, h.s.seen.store = counting, counting
	r, err := h.File(context.Background(), servicetest.Filing("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Approve(r.ID, r.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := h.issueNow(r.ID, "0a"); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(context.Background(), nodeCallerKey{}, nodeCaller{r.Node, "192.0.2.1"})
	return h, counting, func() (*musterv1.ReportResponse, error) {
		return nodeService{Server: h.s}.Report(ctx, &musterv1.ReportRequest{StatusDigest: make([]byte, 32)})
	}
}

// TestReportWithoutNews is smaller than 200 bytes and reads no database.
func TestReportWithoutNews(t *testing.T) {
	h, counting, report := reporter(t)
	if _, err := report(); err != nil {
		t.Fatal(err)
	}
	if counting.n.Load() == 0 {
		t.Error("the first report does not make the node active: the counter counts nothing")
	}
	counting.n.Store(0)
	for i := range 100 {
		h.clock.set(servicetest.Start.Add(time.Duration(i+1) * time.Minute))
		out, err := report()
		if err != nil {
			t.Fatal(err)
		}
		if n := proto.Size(out); n >= 200 {
			t.Fatalf("the answer has %d bytes", n)
		}
	}
	if n := counting.n.Load(); n != 0 {
		t.Errorf("100 reports made %d transactions", n)
	}
	h.s.seen.flush(context.Background())
	if n := counting.n.Load(); n != 1 {
		t.Errorf("writing the last-seen of one node made %d transactions", n)
	}
	var node fleet.Node
	if err := counting.View(context.Background(), func(r store.Reader) error {
		nodes, err := r.Nodes(DefaultTenant, "", 9)
		node = nodes[0]
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := servicetest.Start.Add(100 * time.Minute); !node.LastSeen.Equal(want) {
		t.Errorf("last seen %s, want %s", node.LastSeen, want)
	}
}

func BenchmarkReport(b *testing.B) {
	_, _, report := reporter(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := report(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFile(b *testing.B) {
	h := newHarness(b, b.TempDir())
	f := servicetest.Filing("a")
	for b.Loop() {
		if _, err := h.File(context.Background(), f); err != nil {
			b.Fatal(err)
		}
	}
}
