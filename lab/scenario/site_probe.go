package scenario

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
)

// probeEvery is the pause between two questions to the API.
const probeEvery = 200 * time.Millisecond

// gaps measures how long the API does not answer, as seen from the founder and
// from the nodes that stay workers.
type gaps struct {
	s       *shop
	founder *box
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu    sync.Mutex
	worst map[string]time.Duration
	asked map[string]int
	last  map[string]time.Time // the last good answer
}

// probe begins to measure.
func (s *shop) probe(ctx context.Context) *gaps {
	ctx, cancel := context.WithCancel(ctx)
	g := &gaps{s: s, stop: cancel, worst: map[string]time.Duration{}, asked: map[string]int{}, last: map[string]time.Time{}}
	servers := s.watch.now().with(s, roleServer)
	if len(servers) == 0 {
		return g
	}
	founder := servers[0]
	g.wg.Go(func() { g.ask(ctx, founder.Name(), founder, founder) })
	g.founder = founder
	if len(s.nodes) <= 3 {
		s.l.Site(func(r *lab.SiteResult) {
			r.Remarks = append(r.Remarks, "api_gap_ms.worker: with three nodes none stays a worker")
		})
		return g
	}
	// Who stays a worker shows at the end: all are asked.
	for _, b := range s.nodes {
		if b != founder {
			g.wg.Go(func() {
				if g.working(ctx, b) {
					g.ask(ctx, b.Name(), b, founder)
				}
			})
		}
	}
	return g
}

// working waits until a node is a worker.
func (g *gaps) working(ctx context.Context, b *box) bool {
	for g.s.watch.now().role(b) != roleWorker {
		if sleep.For(ctx, probeEvery) != nil {
			return false
		}
	}
	return true
}

func (g *gaps) ask(ctx context.Context, who string, from, of *box) {
	for ctx.Err() == nil {
		k, err := from.kube(of)
		if err == nil && from != of {
			k.base, err = from.workersWay(of)
		}
		if err == nil {
			k.client.Timeout = 2 * time.Second
			err = k.ready(ctx)
		}
		now := time.Now()
		g.mu.Lock()
		g.asked[who]++
		if err == nil {
			if at, ok := g.last[who]; ok {
				g.worst[who] = max(g.worst[who], now.Sub(at)-probeEvery)
			}
			g.last[who] = now
		}
		g.mu.Unlock()
		if sleep.For(ctx, probeEvery) != nil {
			return
		}
	}
}

// workersWay is where a worker's own kubelet finds the API: k3s' load balancer
// on its loopback.
func (b *box) workersWay(*box) (string, error) { return "https://127.0.0.1:6444", nil }

func (g *gaps) end() {
	g.stop()
	g.wg.Wait()
}

// report puts the gaps into the result.
func (g *gaps) report() {
	g.mu.Lock()
	defer g.mu.Unlock()
	v := g.s.watch.now()
	for _, b := range g.s.nodes {
		who := "worker"
		if b == g.founder {
			who = "founder"
		} else if v.role(b) != roleWorker {
			continue
		}
		if _, ok := g.last[b.Name()]; !ok {
			continue
		}
		ms := float64(g.worst[b.Name()].Milliseconds())
		g.s.l.Site(func(r *lab.SiteResult) {
			if old := r.APIGap[who]; old == nil || *old < ms {
				r.APIGap[who] = &ms
			}
		})
		g.s.l.Say("lab", "api-gap", fmt.Sprintf("longest time without an answer of the API seen from the %s %s: %.0f ms (%d questions)", who, b.Name(), ms, g.asked[b.Name()]))
	}
}

// post sends JSON and wants it created.
func post(ctx context.Context, c *http.Client, url, body string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	rsp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer rsp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(rsp.Body, 4096))
	if err != nil {
		return err
	}
	if rsp.StatusCode != http.StatusCreated {
		return fmt.Errorf("%s: %s: %.200s", url, rsp.Status, text)
	}
	return nil
}
