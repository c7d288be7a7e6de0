package central

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/enroll/service/servicetest"
	"github.com/muster-edge/muster/fleet/access"
	"github.com/muster-edge/muster/internal/dev/benchrow"
)

// TestBenchQueue: the approval queue with 10,000 machines in it, as `muster
// get requests` asks for it: the most urgent 1,000, in one message.
func TestBenchQueue(t *testing.T) {
	part := benchrow.Begin(t, "queue")
	h := newHarness(t, t.TempDir())
	const n = 10_000
	began := time.Now()
	for i := range n {
		if _, err := h.File(context.Background(), servicetest.Filing(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	part.Add(t, benchrow.Row{What: "filing 10,000 requests one after the other, each on disk before it is answered", Unit: "requests/s", Ours: []float64{n / time.Since(began).Seconds()}})
	list := benchrow.Row{What: "listing the queue with 10,000 pending (1,000 in an answer)", Unit: "s", Less: true}
	size := 0
	for range 9 {
		began := time.Now()
		out, err := management{Server: h.s}.ListRequests(access.NewContext(t.Context(), testCaller.Principal), &musterv1.ListRequestsRequest{State: "pending"})
		if err != nil {
			t.Fatal(err)
		}
		b, err := proto.Marshal(out)
		if err != nil || len(out.Requests) != 1000 || !out.More {
			t.Fatalf("%d requests, more %v, %v", len(out.Requests), out.More, err)
		}
		size = len(b)
		list.Ours = append(list.Ours, time.Since(began).Seconds())
	}
	list.Note = fmt.Sprintf("%d KiB", size>>10)
	part.Add(t, list)
}
