package turns

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// site is a sound site of three servers and a worker; the first one asks.
func site() Facts {
	f := Facts{Now: time.Unix(1_700_000_000, 0).UTC(), Self: nodeID(0), Server: true, Image: imageText, Version: "2", K3s: "v2", Open: true, Clustered: true, API: true,
		DrainLimit: 5 * time.Minute}
	for i := range 4 {
		f.Nodes = append(f.Nodes, Node{ID: nodeID(i), Ready: true, Server: i < 3, K3s: "v1"})
		if i < 3 {
			f.Voters = append(f.Voters, nodeID(i))
		}
	}
	return f
}

func turnOf(i int) *Turn { return &Turn{Node: nodeID(i), Image: imageText, Version: "2"} }

func TestDecide(t *testing.T) {
	worker := func(f *Facts) { f.Self, f.Server = nodeID(3), false }
	for _, c := range []struct {
		name  string
		with  func(*Facts)
		state State
		step  Step
		say   string
	}{
		{"when all is well then it takes the turn", func(*Facts) {}, Draining, Write, "takes the turn"},
		{"when the window is closed then it waits and says until when", func(f *Facts) { f.Open, f.Opens = false, time.Unix(1_700_010_000, 0) }, Queued, Wait, "opens at Wed 01:00 UTC"},
		{"when the window closes under a turn then it gives it back", func(f *Facts) { f.Open, f.Ledger.Turn = false, turnOf(0) }, Queued, Write, "closed"},
		{"when it was cordoned then it is uncordoned first", func(f *Facts) { f.Open, f.Ledger.Turn, f.Cordoned = false, turnOf(0), true }, Queued, Uncordon, "closed"},
		{"when there is no cluster then it goes", func(f *Facts) { f.Clustered, f.API = false, false }, Down, Go, "no cluster"},
		{"when there is no cluster and no window then it waits", func(f *Facts) { f.Clustered, f.Open = false, false }, Queued, Wait, "window"},
		{"when the cluster is silent then it waits", func(f *Facts) { f.API = false }, Queued, Wait, "does not answer"},
		{"when servers change then it waits", func(f *Facts) { f.Busy = "a promotion is under way" }, Queued, Wait, "promotion"},
		{"when a node is away then it waits", func(f *Facts) { f.Nodes[3].Ready = false }, Queued, Wait, "not ready"},
		{"when a learner is there then it waits", func(f *Facts) { f.Learners = 1 }, Queued, Wait, "new server"},
		{"when a voter is no server then it waits", func(f *Facts) { f.Voters = f.Voters[:2] }, Queued, Wait, "2 members"},
		{"when there are two servers then none goes", func(f *Facts) { f.Voters, f.Nodes[2].Server = f.Voters[:2], false }, Queued, Wait, "two servers"},
		{"when the cluster does not know the node then it waits", func(f *Facts) { f.Self = nodeID(7) }, Queued, Wait, "does not know"},
		{"when another has the turn then it waits", func(f *Facts) { f.Ledger.Turn = turnOf(1) }, Queued, Wait, "has the turn"},
		{"when a draining one was silent for long then the turn is taken", func(f *Facts) { f.Ledger.Turn, f.LedgerFor = turnOf(1), Hold }, Draining, Write, "takes"},
		{"when the holder is no node any more then the turn is taken", func(f *Facts) { f.Ledger.Turn = turnOf(9); f.Ledger.Turn.Down = true }, Draining, Write, "takes"},
		{"when it has the turn then it drains", func(f *Facts) { f.Ledger.Turn = turnOf(0) }, Draining, Drain, "no new pods"},
		{"when pods are left then it waits for them", func(f *Facts) { f.Ledger.Turn, f.Cordoned, f.Pods = turnOf(0), true, 3 }, Draining, Drain, "3 pods"},
		{"when pods are slow then it shows life", func(f *Facts) { f.Ledger.Turn, f.Cordoned, f.Pods, f.LedgerFor = turnOf(0), true, 3, renewAfter }, Draining, Write, "keeps"},
		{"when pods stay then it gives up", func(f *Facts) {
			f.Ledger.Turn, f.Cordoned, f.Pods, f.Draining = turnOf(0), true, 3, time.Hour
		}, Queued, Uncordon, "did not leave"},
		{"when pods stay and force is allowed then it goes on", func(f *Facts) {
			f.Ledger.Turn, f.Cordoned, f.Pods, f.Draining, f.Force = turnOf(0), true, 3, time.Hour, true
		}, Down, Write, "keeps"},
		{"when it gave up lately then it rests", func(f *Facts) { f.GaveUp = time.Minute }, Queued, Wait, "tries again"},
		{"when drained then it says so before it goes", func(f *Facts) { f.Ledger.Turn, f.Cordoned = turnOf(0), true }, Down, Write, "keeps"},
		{"when it has just said so then it goes", func(f *Facts) { f.Ledger.Turn, f.Cordoned = turnOf(0), true; f.Ledger.Turn.Down = true }, Down, Go, "turn"},
		{"when it said so long ago then it says so again", func(f *Facts) {
			f.Ledger.Turn, f.Cordoned, f.LedgerFor = turnOf(0), true, sure
			f.Ledger.Turn.Down = true
		}, Down, Write, "keeps"},
		{"when servers are older then a worker waits", worker, Queued, Wait, "goes first"},
		{"when it is a way back then a worker does not wait", func(f *Facts) { worker(f); f.Older = true }, Draining, Write, "takes"},
		{"when servers are done then a worker goes", func(f *Facts) {
			worker(f)
			for i := range f.Nodes {
				f.Nodes[i].K3s = "v2"
			}
		}, Draining, Write, "takes"},
		{"when it failed elsewhere then the site stops", func(f *Facts) {
			f.Ledger.Failed = []Failed{{Image: imageText, Version: "2", Node: nodeID(1), Reason: "k3s"}}
		}, Stopped, Wait, "failed on node"},
		{"when the node it failed on is gone then it goes on", func(f *Facts) { f.Ledger.Failed = []Failed{{Image: imageText, Node: nodeID(9)}} }, Draining, Write, "takes"},
		{"when it failed here and was forgiven then that goes first", func(f *Facts) { f.Ledger.Failed = []Failed{{Image: imageText, Node: nodeID(0)}} }, Queued, Write, "forgiven"},
		{"when it is judged then the turn is kept", func(f *Facts) { f.Phase, f.Ledger.Turn, f.LedgerFor = Judging, turnOf(0), renewAfter }, Back, Write, "keeps"},
		{"when it is judged and all is fresh then it waits", func(f *Facts) { f.Phase, f.Ledger.Turn = Judging, turnOf(0) }, Back, Wait, "judged"},
		{"when it is well then it is uncordoned", func(f *Facts) { f.Phase, f.Ledger.Turn, f.Cordoned = Settled, turnOf(0), true }, Idle, Uncordon, "back"},
		{"when it is uncordoned then the turn is free", func(f *Facts) { f.Phase, f.Ledger.Turn = Settled, turnOf(0) }, Idle, Write, "back"},
		{"when it failed then that is told first", func(f *Facts) { f.Phase, f.Failed, f.Cordoned = Settled, "k3s", true }, Back, Write, "failed here"},
		{"when it works after all then the failure goes", func(f *Facts) { f.Phase, f.Ledger.Failed = Settled, []Failed{{Image: imageText, Node: nodeID(0)}} }, Back, Write, "after all"},
		{"when another has the turn then a settled one leaves it alone", func(f *Facts) { f.Phase, f.Ledger.Turn = Settled, turnOf(1) }, Idle, Wait, "back"},
		{"when there is nobody to tell then it is silent", func(f *Facts) { f.Phase, f.API = Settled, false }, Idle, Wait, "no cluster"},
	} {
		f := site()
		c.with(&f)
		before := f.Ledger
		a := Decide(f)
		if a.State != c.state || a.Step != c.step || !strings.Contains(a.Reason, c.say) {
			t.Errorf("%s: %s %s %q", c.name, a.State, a.Step, a.Reason)
		}
		if !reflect.DeepEqual(before, f.Ledger) {
			t.Errorf("%s: the ledger that was read was changed", c.name)
		}
		if a.Step == Write && reflect.DeepEqual(a.Ledger, before) {
			t.Errorf("%s: it writes what is there", c.name)
		}
	}
}

func TestWords(t *testing.T) {
	for i := range numPhases {
		if p, err := ParsePhase(i.String()); err != nil || p != i {
			t.Error(i, err)
		}
	}
	if _, err := ParsePhase("phase(3)"); err == nil {
		t.Error("a phase that is none")
	}
	for i := range numStates {
		if strings.Contains(i.String(), "(") {
			t.Error(i)
		}
	}
	for i := range numSteps {
		if strings.Contains(i.String(), "(") {
			t.Error(i)
		}
	}
}

func TestLedgerRefusesWhatIsNone(t *testing.T) {
	for _, l := range []Ledger{
		{Turn: &Turn{Node: "x", Image: imageText}},
		{Turn: &Turn{Node: nodeID(0), Image: "short"}},
		{Failed: make([]Failed, MaxFailed+1)},
		{Failed: []Failed{{Node: nodeID(0), Image: imageText, Reason: strings.Repeat("x", maxText+1)}}},
	} {
		if _, err := l.Encode(); err == nil {
			t.Errorf("%+v", l)
		}
	}
}

func FuzzLedger(f *testing.F) {
	b, err := Ledger{Turn: turnOf(1), Failed: []Failed{{Image: imageText, Node: nodeID(2), Reason: "k3s"}}}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Decode(b)
		if err != nil {
			return
		}
		c, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if x, err := Decode(c); err != nil || !reflect.DeepEqual(x, l) && len(x.Failed)+len(l.Failed) > 0 {
			t.Fatal(err)
		}
		for p := range numPhases {
			_ = Decide(Facts{Phase: p, Ledger: l, Clustered: true, API: true, Open: true, Self: fleet.NodeID("x")})
		}
	})
}
