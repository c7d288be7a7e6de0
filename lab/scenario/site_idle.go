package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/internal/sleep"
	"github.com/muster-edge/muster/lab"
)

// idleFor is how long agents are watched doing nothing.
const idleFor = 20 * time.Second

// idle notes what the node agents take while nothing happens. Each answers
// the watch's question once a second meanwhile.
func (s *shop) idle(ctx context.Context) error {
	type use struct{ rss, ticks int64 }
	look := func() (map[string]use, error) {
		out := map[string]use{}
		for _, b := range s.nodes {
			u, err := agentUse(b.PID())
			if err != nil {
				return nil, fmt.Errorf("%s: %w", b.Name(), err)
			}
			out[b.Name()] = use{u[0], u[1]}
		}
		return out, nil
	}
	before, err := look()
	if err != nil {
		return err
	}
	began := time.Now()
	if err := sleep.For(ctx, idleFor); err != nil {
		return err
	}
	after, err := look()
	if err != nil {
		return err
	}
	var rss int64
	var cpu float64
	for name, u := range after {
		rss = max(rss, u.rss)
		cpu = max(cpu, float64(u.ticks-before[name].ticks)/100/time.Since(began).Seconds())
	}
	s.l.Site(func(r *lab.SiteResult) {
		r.Remarks = append(r.Remarks, fmt.Sprintf("node agent at rest, the largest of %d: %.1f MB resident, %.2f %% of a core (asked for its status once a second)",
			len(after), float64(rss)/1e6, cpu*100))
	})
	return nil
}

// agentUse returns resident bytes and CPU time in ticks of a hundredth second
// of the agent below a node's first process (proc_pid_stat(5)).
func agentUse(first int) (out [2]int64, err error) {
	list, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return out, err
	}
	for _, path := range list {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		end := bytes.LastIndexByte(b, ')')
		f := strings.Fields(string(b[end+1:]))
		if len(f) < 22 || f[1] != strconv.Itoa(first) {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if args := strings.Split(string(cmdline), "\x00"); err != nil || len(args) < 2 || args[1] != agentName {
			continue
		}
		user, err1 := strconv.ParseInt(f[11], 10, 64)
		system, err2 := strconv.ParseInt(f[12], 10, 64)
		pages, err3 := strconv.ParseInt(f[21], 10, 64)
		return [2]int64{pages * int64(os.Getpagesize()), user + system}, errors.Join(err1, err2, err3)
	}
	return out, errors.New("no agent runs there")
}
