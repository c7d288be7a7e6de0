package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// maxBriefing caps what the process inside reads on standard input.
const maxBriefing = 1 << 20

// Inside is the whole life of the first process in the namespaces: it reads
// its briefing, makes the network, runs the scenario that find returns, ends
// everything in order and writes result.json.
func Inside(ctx context.Context, in io.Reader, people io.Writer, find func(name string) (Scenario, bool)) error {
	text, err := io.ReadAll(io.LimitReader(in, maxBriefing))
	if err != nil {
		return fmt.Errorf("lab: read briefing: %w", err)
	}
	var b briefing
	if err := json.Unmarshal(text, &b); err != nil {
		return fmt.Errorf("lab: read briefing (this command is started by `muster lab run`): %w", err)
	}
	sc, ok := find(b.Spec.Scenario)
	if !ok {
		return fmt.Errorf("lab: no scenario %q", b.Spec.Scenario)
	}
	if err := settle(); err != nil {
		return err
	}
	l, err := newLab(b, people)
	if err != nil {
		return err
	}
	defer l.line.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	control, err := l.listen(cancel)
	if err != nil {
		return err
	}
	defer control.Close()

	runErr := l.live(ctx, sc)

	if runErr != nil && ctx.Err() == nil {
		var told *checkError
		if !errors.As(runErr, &told) {
			l.Say("lab", "failed", runErr.Error())
		}
		l.autopsy(people)
	} else if runErr == nil && ctx.Err() == nil {
		l.Say("lab", "held", "everything held")
	}
	// The verdict is on disk before machines are kept or ended: a person can
	// read it while looking around, and a slow end cannot lose it.
	result := l.verdict(runErr)
	writeErr := result.write(l.Dir)
	if b.Spec.Keep && ctx.Err() == nil {
		l.Say("lab", "keep", "the machines stay on; end with Ctrl-C")
		l.setPhase("kept")
		<-ctx.Done()
	}
	l.setPhase("ending")
	closeErr := l.close()
	if closeErr != nil {
		l.Say("lab", "end", closeErr.Error())
	}
	l.Note("lab", "end", "")
	l.setPhase("ended")
	// What did not hold is in the result; the parent tells it.
	return writeErr
}

// live makes the network and runs the scenario within its time.
func (l *Lab) live(ctx context.Context, sc Scenario) error {
	l.setPhase("running")
	if sc.Host {
		if err := makeHostNetwork(); err != nil {
			return err
		}
	} else {
		if err := makeNetwork(); err != nil {
			return err
		}
		l.Note("lab", "network", Subnet+" on "+Bridge)
	}
	if l.Spec.Timeout > 0 {
		spent := time.Since(l.line.began)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, l.Spec.Timeout-spent, fmt.Errorf("the run took longer than --timeout %v", l.Spec.Timeout))
		defer cancel()
	}
	err := sc.Run(ctx, l)
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w (%w)", err, cause)
	}
	return err
}

// verdict completes the result.
func (l *Lab) verdict(runErr error) Result {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.result
	r.OK = runErr == nil
	for _, c := range r.Checks {
		r.OK = r.OK && c.OK
	}
	if runErr != nil {
		r.Error = runErr.Error()
		var unable *Unable
		r.Unable = errors.As(runErr, &unable)
	}
	r.Timings["total_s"] = seconds(time.Since(l.line.began).Seconds())
	return r
}
