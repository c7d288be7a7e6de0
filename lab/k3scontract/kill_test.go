package k3scontract

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// killCase is one promotion of two workers with a power cut in it.
type killCase struct {
	who   string        // "founder", "learner", "both" (founder and one learner)
	when  string        // "learners": two learners are there; "change": the role change
	delay time.Duration // counted from when
	stays bool          // the killed ones never come back
}

func (k killCase) String() string {
	s := fmt.Sprintf("%s killed", k.who)
	if k.when == "learners" {
		s += fmt.Sprintf(", %.1f s after two learners are seen", k.delay.Seconds())
	} else {
		s += fmt.Sprintf(", %.1f s after the role change", k.delay.Seconds())
	}
	if k.stays {
		return s + ", for good"
	}
	return s + ", back after 5 s"
}

// killOutcome is what came of it.
type killOutcome struct {
	Case     string   `json:"case"`
	AtKill   string   `json:"at_kill"`     // members as the founder saw them just before
	Voters   int      `json:"voters"`      // at the end, -1: nobody answers
	Learners int      `json:"learners"`    // at the end
	API      bool     `json:"api"`         // some living server serves
	Seconds  float64  `json:"seconds"`     // from the kill to three voters, or to the end of the watch
	Ends     []string `json:"ends"`        // statuses of the processes that ended by themselves
	Data     bool     `json:"data_intact"` // what was acknowledged before is readable (when the API answers)
}

// A case is watched for three voters: for three rounds of the leader's loop when
// somebody is gone for good, longer when everybody comes back.
const (
	watchGone = 45 * time.Second
	watchBack = 2 * time.Minute
)

// TestKill is the series that the design of a promotion rests on: it is no row
// of the contract but a measurement, and fails only when something that was
// acknowledged is lost or when a run could not be made. K3SCONTRACT_KILLS names
// the file for its table; without it the series does not run.
func TestKill(t *testing.T) {
	out := os.Getenv("K3SCONTRACT_KILLS")
	if out == "" {
		t.Skip("not run: a series of minutes; set K3SCONTRACT_KILLS=FILE")
	}
	var cases []killCase
	for _, stays := range []bool{true, false} {
		for _, who := range []string{"founder", "learner", "both"} {
			cases = append(cases,
				killCase{who, "learners", 0, stays},
				killCase{who, "learners", 4 * time.Second, stays},
			)
			if stays {
				cases = append(cases, killCase{who, "change", 500 * time.Millisecond, stays})
			}
		}
	}
	var outs []killOutcome
	for i, k := range cases {
		t.Run(fmt.Sprintf("%02d", i), func(t *testing.T) {
			o := runKill(t, k)
			outs = append(outs, o)
			t.Logf("%s: %+v", k, o)
			if o.API && !o.Data {
				t.Errorf("%s: acknowledged data are gone", k)
			}
		})
		b, err := json.MarshalIndent(map[string]any{"k3s": k3s.Kind, "version": k3s.Version, "cases": outs}, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(out, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func runKill(t *testing.T, k killCase) killOutcome {
	b, a, bb, c := site(t)
	a.put(t, "acknowledged", "value")
	promote(a, bb, c)
	if k.when == "learners" {
		b.eventually("two learners", time.Minute, func() error {
			v, l, err := a.voters()
			if err != nil || l != 2 {
				return fmt.Errorf("%d voters, %d learners: %w", v, l, err)
			}
			return nil
		})
	}
	if k.delay > 0 {
		<-time.After(k.delay) // the moment of the power cut is the input here
	}
	o := killOutcome{Case: k.String(), AtKill: describe(a)}
	victims := map[string][]*node{"founder": {a}, "learner": {c}, "both": {a, c}}[k.who]
	for _, v := range victims {
		v.p.signal(9)
	}
	killed := time.Now()
	for _, v := range victims {
		<-v.p.done
	}
	if !k.stays {
		<-time.After(restartAfter)
		for _, v := range victims {
			if v == a {
				a.start(true, nil, a.founderArgs()...)
			} else {
				v.serve(a)
			}
		}
	}
	var alive []*node
	for _, n := range []*node{a, bb, c} {
		if !k.stays || !slices.Contains(victims, n) {
			alive = append(alive, n)
		}
	}
	limit := watchGone
	if !k.stays {
		limit = watchBack
	}
	_ = b.within(limit, func() error {
		o.Voters, o.Learners = -1, 0
		for _, n := range alive {
			if v, l, err := n.voters(); err == nil {
				o.Voters, o.Learners = v, l
				break
			}
		}
		if o.Voters != 3 || o.Learners != 0 {
			return fmt.Errorf("%d voters", o.Voters)
		}
		return nil
	})
	o.Seconds = float64(time.Since(killed).Milliseconds()) / 1000
	// Members come before the API: one that has just come back needs a moment.
	_ = b.within(watchGone, func() error {
		for _, n := range alive {
			if code, _, err := n.admin(http.MethodGet, "/readyz", nil); err == nil && code == 200 {
				o.API = true
				v, err := n.value("acknowledged")
				o.Data = err == nil && v == "value"
				return nil
			}
		}
		return errors.New("no API")
	})
	for _, n := range alive {
		if codes := n.p.codes(); len(codes) > 0 {
			o.Ends = append(o.Ends, fmt.Sprintf("%s %v", n.name, codes))
		}
	}
	return o
}

// describe is the member list in a few words.
func describe(n *node) string {
	ms, err := n.members()
	if err != nil {
		return err.Error()
	}
	var l []string
	for _, m := range ms {
		name, _, _ := strings.Cut(m.Name, "-")
		if name == "" {
			name = "(not started)"
		}
		if m.IsLearner {
			name += " learner"
		} else {
			name += " voter"
		}
		l = append(l, name)
	}
	return strings.Join(l, ", ")
}
