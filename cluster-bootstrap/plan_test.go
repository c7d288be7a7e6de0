package clusterbootstrap

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"pgregory.net/rapid"
)

func id(c byte) fleet.NodeID { return fleet.NodeID("n-" + strings.Repeat(string(c), 24)) }

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// site is what a node of a three-node site knows after its first hello.
func site(mode fleet.FoundingMode, self byte) Observation {
	c := &fleet.Charter{Policy: fleet.DefaultPolicy(), Birth: fleet.DefaultBirth(), Founding: fleet.Founding{Mode: mode}}
	if mode == fleet.FoundNamed {
		c.Founding.Founder = id('a')
	}
	o := Observation{Self: id(self), Boot: "1", Mono: time.Hour, Fresh: "fresh", Docs: Documents{Charter: c}, Survey: &Survey{Round: 1}}
	for _, n := range "abc" {
		o.Docs.Admissions = append(o.Docs.Admissions, fleet.Admission{Node: id(byte(n)), Incarnation: 1, MayServe: true})
	}
	return o
}

func peer(c byte, change func(*Status)) Peer {
	s := &Status{Node: id(c), Boots: 1, Seq: 1}
	if change != nil {
		change(s)
	}
	return Peer{Words: string(c), Age: time.Second, Status: s}
}

func rec(epoch, version uint64, servers string) *Record {
	r := &Record{UID: "u", Epoch: epoch, Version: version, Founder: id('a')}
	for i := range len(servers) {
		r.Servers = append(r.Servers, id(servers[i]))
	}
	return r
}

// Each row has a negative twin: the same node with one fact changed.
func TestPlan(t *testing.T) {
	own := &Claim{Node: id('a'), Round: 1, Token: "fresh"}
	acked := func(s *Status) { s.Ack = own }
	server := func(o *Observation, r *Record) {
		o.Disk = Disk{Role: RoleServer, Record: r, Datastore: true, Mark: "u"}
		o.K3s = K3s{Process: ProcessServer, Running: time.Hour, API: true, Ledger: &Ledger{Version: 1, Record: *r}}
		for _, s := range r.Servers {
			o.K3s.Members = append(o.K3s.Members, Member{Node: s})
		}
	}
	for _, c := range []struct {
		when    string
		obs     func() Observation
		state   State
		first   ActionKind
		blocker Blocker
	}{
		{"there is no charter", func() Observation { return Observation{Self: id('a')} }, Waiting, Wait, NoCharter},
		{"it is not admitted", func() Observation { o := site(fleet.FoundFirst, 'd'); return o }, Waiting, Wait, NotAdmitted},
		{"it was removed and runs k3s", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Docs.Removals = []fleet.Removal{{Node: id('a'), Incarnation: 1}}
			o.K3s.Process = ProcessAgent
			return o
		}, Removed, StopK3s, NoBlocker},
		{"it was removed and admitted again", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			o.Docs.Removals = []fleet.Removal{{Node: id('a'), Incarnation: 1}}
			o.Docs = o.Docs.Merge(Documents{Admissions: []fleet.Admission{{Node: id('a'), Incarnation: 2, MayServe: true}}})
			return o
		}, Founding, FoundCluster, NoBlocker},
		{"the charter names it", func() Observation { return site(fleet.FoundNamed, 'a') }, Founding, FoundCluster, NoBlocker},
		{"the charter names another", func() Observation { return site(fleet.FoundNamed, 'b') }, Waiting, Wait, FounderAway},
		{"the charter names it but the TPM remembers a cluster", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			o.Disk.Mark = "u"
			return o
		}, Waiting, Wait, ServersLost},
		{"an order names it in place of the founder", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Mandate = &Mandate{Kind: MandateFound, NotAfter: t0.Add(time.Hour)}
			return o
		}, Founding, FoundCluster, NoBlocker},
		{"that order has ended", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Mandate = &Mandate{Kind: MandateFound, NotAfter: t0}
			return o
		}, Waiting, Wait, FounderAway},
		{"the centre granted", func() Observation {
			o := site(fleet.FoundCentral, 'a')
			o.Centre = Centre{Reachable: true, Granted: id('a')}
			return o
		}, Founding, FoundCluster, NoBlocker},
		{"the centre does not know any more", func() Observation {
			o := site(fleet.FoundCentral, 'a')
			o.Centre = Centre{Reachable: true, Unsure: true}
			return o
		}, Waiting, AskGrant, CentreUnsure},
		{"all peers acknowledged", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Claim, o.Peers = own, []Peer{peer('b', acked), peer('c', acked)}
			return o
		}, Founding, FoundCluster, NoBlocker},
		{"one peer did not acknowledge", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Claim, o.Peers = own, []Peer{peer('b', acked), peer('c', nil)}
			return o
		}, Claiming, Wait, AckMissing},
		{"an acknowledgement is stale", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			p := peer('b', acked)
			p.Age = 21 * time.Second
			o.Claim, o.Peers = own, []Peer{p}
			return o
		}, Claiming, Wait, AckMissing},
		{"the survey is not over", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Survey.Since = o.Mono - 59*time.Second
			return o
		}, Surveying, Wait, Settling},
		{"the survey is over", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Survey.Since = o.Mono - 60*time.Second
			return o
		}, Claiming, ClaimFounding, NoBlocker},
		{"somebody else founds", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			o.Peers = []Peer{peer('b', func(s *Status) { s.Intent = true })}
			return o
		}, Waiting, Wait, ServerAway},
		{"a server was replaced meanwhile", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleServer, Record: rec(1, 2, "abc"), Datastore: true}
			o.Docs.Records = []Record{*rec(1, 3, "acd")}
			return o
		}, Leaving, MoveAside, NoBlocker},
		{"a server is still one", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleServer, Record: rec(1, 2, "abc"), Datastore: true}
			o.Docs.Records = []Record{*rec(1, 2, "abc")}
			return o
		}, Server, StartServer, NoBlocker},
		{"a server's epoch is old", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleServer, Record: rec(1, 2, "abc"), Datastore: true}
			o.Docs.Records = []Record{*rec(2, 1, "a")}
			return o
		}, Leaving, MoveAside, NoBlocker},
		{"quorum is lost inside the window", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			server(&o, rec(1, 1, "a"))
			o.Disk.Lead = &Lead{Plan: "p", Epoch: 1, Phase: LeadOpen, Candidates: []fleet.NodeID{id('b'), id('c')}}
			o.K3s = K3s{Process: ProcessServer, Running: time.Hour, NoInfo: 46 * time.Second}
			return o
		}, Recovering, BeginReset, NoBlocker},
		{"quorum is lost and the confirmation may be written", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			server(&o, rec(1, 1, "a"))
			o.Disk.Lead = &Lead{Plan: "p", Epoch: 1, Phase: LeadConfirming, Candidates: []fleet.NodeID{id('b'), id('c')}}
			o.K3s = K3s{Process: ProcessServer, Running: time.Hour, NoInfo: 46 * time.Second}
			return o
		}, Waiting, Wait, NoQuorum},
		{"a reset was decided and a lease may still run", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			server(&o, rec(1, 1, "a"))
			o.K3s, o.Disk.Reset = K3s{}, &Reset{Plan: "p", To: 2}
			o.LastGrant = o.Mono - 44*time.Second
			return o
		}, Recovering, Wait, LeaseRunsOut},
		{"a reset was decided and all leases have ended", func() Observation {
			o := site(fleet.FoundNamed, 'a')
			server(&o, rec(1, 1, "a"))
			o.K3s, o.Disk.Reset = K3s{}, &Reset{Plan: "p", To: 2}
			o.LastGrant = o.Mono - 46*time.Second
			return o
		}, Recovering, ResetToOwnData, NoBlocker},
		{"a candidate's lease has ended", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleCandidate, Record: rec(1, 1, "a"), Step: &Step{Plan: "p", Epoch: 1, Leader: id('a'), Phase: StepSwitched}, Datastore: true}
			o.K3s.Process = ProcessServer
			o.Lease = Lease{Plan: "p", Until: o.Mono}
			return o
		}, Candidate, StopK3s, LeaseMissing},
		{"a candidate is confirmed", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleCandidate, Record: rec(1, 1, "a"), Step: &Step{Plan: "p", Epoch: 1, Leader: id('a'), Phase: StepSwitched}, Datastore: true}
			o.Docs.Records = []Record{*rec(1, 2, "abc")}
			return o
		}, Server, KeepRecord, NoBlocker},
		{"a tombstone says that it was replaced", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			server(&o, rec(1, 2, "abc"))
			o.K3s, o.Disk.Tombstone = K3s{}, true
			return o
		}, Leaving, MoveAside, NoBlocker},
		{"no server is left, and a fellow worker served once", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleWorker, Record: rec(1, 1, "a"), AgentCert: true}
			o.K3s.Process = ProcessAgent
			p := peer('c', func(s *Status) { s.Role, s.Record = RoleWorker, rec(1, 1, "a") })
			p.Served = 11 * time.Minute
			o.Peers = []Peer{p}
			return o
		}, Waiting, Wait, ServersLost},
		{"the same, and a server is heard that does not serve", func() Observation {
			o := site(fleet.FoundNamed, 'b')
			o.Disk = Disk{Role: RoleWorker, Record: rec(1, 1, "a"), AgentCert: true}
			o.K3s.Process = ProcessAgent
			p := peer('a', func(s *Status) { s.Role, s.Record = RoleServer, rec(1, 1, "a") })
			p.Served = 11 * time.Minute
			o.Peers = []Peer{p}
			return o
		}, Waiting, Wait, ServerAway},
		{"another cluster with data has more servers", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			server(&o, rec(1, 1, "a"))
			o.Peers = []Peer{peer('b', func(s *Status) {
				s.API, s.Role, s.Record = true, RoleServer, &Record{UID: "v", Servers: make([]fleet.NodeID, 3)}
			})}
			return o
		}, Fenced, Wait, TwoClusters},
		{"the same, and its own is empty", func() Observation {
			o := site(fleet.FoundFirst, 'a')
			server(&o, rec(1, 1, "a"))
			o.K3s.Virgin = true
			o.Peers = []Peer{peer('b', func(s *Status) {
				s.API, s.Role, s.Record = true, RoleServer, &Record{UID: "v", Servers: make([]fleet.NodeID, 3)}
			})}
			return o
		}, Fenced, WriteLedger, NoBlocker},
	} {
		s, acts := Plan(t0, c.obs(), Policy{})
		last := acts[len(acts)-1]
		if s != c.state || acts[0].Kind != c.first || last.Blocker != c.blocker {
			t.Errorf("when %s: got %s, %s, %q (%s); want %s, %s, %q", c.when, s, acts[0].Kind, last.Blocker, last.Reason, c.state, c.first, c.blocker)
		}
		for _, a := range acts {
			if a.Reason == "" {
				t.Errorf("when %s: %s has no reason", c.when, a.Kind)
			}
		}
	}
}

func TestAnswers(t *testing.T) {
	o := site(fleet.FoundNamed, 'a')
	r := rec(1, 1, "a")
	o.Disk = Disk{Role: RoleServer, Record: r, Lead: &Lead{Plan: "p", Epoch: 1, Phase: LeadOpen, Candidates: []fleet.NodeID{id('b')}}}
	o.K3s = K3s{API: true, Ledger: &Ledger{Record: *r, Plan: &PlanDoc{ID: "p", Epoch: 1, Phase: PlanPrepare, Candidates: []fleet.NodeID{id('b')}}}}
	material := func(o Observation, c byte, as Role, plan string, quote time.Duration) bool {
		ok, why := AnswerMaterial(o, Policy{}, id(c), as, plan, quote)
		if ok == (why != "") {
			t.Errorf("answer %v with reason %q", ok, why)
		}
		return ok
	}
	removed := o
	removed.Docs.Removals = []fleet.Removal{{Node: id('b'), Incarnation: 1}}
	resetting := o
	resetting.Disk.Reset = &Reset{Plan: "p", To: 2}
	for _, c := range []struct {
		what      string
		got, want bool
	}{
		{"a worker joins", material(o, 'c', RoleWorker, "", 0), true},
		{"a stranger joins", material(o, 'd', RoleWorker, "", 0), false},
		{"the quote is old", material(o, 'c', RoleWorker, "", 61*time.Second), false},
		{"a planned server", material(o, 'b', RoleServer, "p", 0), true},
		{"a server of another plan", material(o, 'b', RoleServer, "q", 0), false},
		{"a server that no plan names", material(o, 'c', RoleServer, "p", 0), false},
		{"a removed node joins", material(removed, 'b', RoleWorker, "", 0), false},
		{"joining during a reset", material(resetting, 'c', RoleWorker, "", 0), false},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v", c.what, c.got)
		}
	}
	lease := func(o Observation, c byte, plan string) bool {
		d, why := AnswerLease(o, Policy{}, id(c), plan)
		if (d > 0) == (why != "") {
			t.Errorf("lease %s with reason %q", d, why)
		}
		return d > 0
	}
	if !lease(o, 'b', "p") || lease(o, 'c', "p") || lease(o, 'b', "q") || lease(removed, 'b', "p") || lease(resetting, 'b', "p") {
		t.Error("leases are given to the wrong ones")
	}
}

func TestPolicy(t *testing.T) {
	if err := (Policy{}).Validate(); err != nil {
		t.Error(err)
	}
	err := Policy{PeerFresh: time.Hour, LeaseRenew: time.Minute}.Validate()
	if err == nil || !strings.Contains(err.Error(), "peer_fresh") || !strings.Contains(err.Error(), "lease_renew") {
		t.Errorf("not all problems are reported: %v", err)
	}
}

func TestStates(t *testing.T) {
	if _, err := Removed.MoveTo(Founding); err == nil {
		t.Error("a removed node founds")
	}
	if _, err := Worker.MoveTo(Founding); err == nil {
		t.Error("a worker founds")
	}
	for s := Observing; s < numStates; s++ {
		if _, err := s.MoveTo(Removed); err != nil || s.String() == "" {
			t.Errorf("%d: %v", s, err)
		}
	}
}

// drawDocs draws documents of few nodes and versions, so that they collide.
func drawDocs(t *rapid.T, name string) Documents {
	var d Documents
	small := func(n string) uint64 { return rapid.Uint64Range(1, 3).Draw(t, name+n) }
	for range rapid.IntRange(0, 5).Draw(t, name+"n") {
		n := id("abc"[small("who")-1])
		v := fleet.DocVersion{Epoch: small("e"), N: small("v")}
		one := Documents{}
		switch small("kind") {
		case 1:
			one.Admissions = []fleet.Admission{{Node: n, Incarnation: small("i"), Version: v, MayServe: small("m") > 1}}
		case 2:
			one.Removals = []fleet.Removal{{Node: n, Incarnation: small("i"), Version: v}}
			one.Charter = &fleet.Charter{Version: v, Site: string(rune('s' + small("c")))}
		case 3:
			one.Records = []Record{{UID: string(rune('u' + small("u"))), Epoch: small("re"), Version: small("rv"), Founder: n}}
		}
		d = d.Merge(one)
	}
	return d
}

func TestMergeIsAUnion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawDocs(t, "a"), drawDocs(t, "b"), drawDocs(t, "c")
		same := func(what string, x, y Documents) {
			if !reflect.DeepEqual(norm(x), norm(y)) {
				t.Fatalf("%s:\n%+v\n%+v", what, x, y)
			}
		}
		same("order", a.Merge(b), b.Merge(a))
		same("grouping", a.Merge(b).Merge(c), a.Merge(b.Merge(c)))
		same("twice", a.Merge(b), a.Merge(b).Merge(b))
		m := a.Merge(b)
		for _, r := range slices.Concat(a.Removals, b.Removals) {
			if adm, ok := m.Admitted(r.Node); ok && adm.Incarnation <= r.Incarnation {
				t.Fatalf("removal of %s, incarnation %d, lost", r.Node, r.Incarnation)
			}
		}
		for _, r := range slices.Concat(a.Records, b.Records) {
			if n, ok := m.Newest(r.UID); !ok || r.Newer(n) {
				t.Fatalf("record %+v lost to %+v", r, n)
			}
		}
	})
}

func norm(d Documents) Documents {
	if len(d.Admissions) == 0 {
		d.Admissions = nil
	}
	if len(d.Removals) == 0 {
		d.Removals = nil
	}
	if len(d.Records) == 0 {
		d.Records = nil
	}
	return d
}

// Of two clusters exactly one is better, whoever looks; the same for claims.
func TestTieBreaks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(n string) *Status {
			return &Status{Virgin: rapid.Bool().Draw(t, n+"virgin"), Record: &Record{UID: rapid.SampledFrom([]string{"u", "v", "w"}).Draw(t, n+"uid"),
				Servers: make([]fleet.NodeID, rapid.IntRange(1, 3).Draw(t, n+"servers"))}}
		}
		a, b, c := draw("a"), draw("b"), draw("c")
		if a.Record.UID != b.Record.UID && betterCluster(a, b) == betterCluster(b, a) {
			t.Fatalf("both or none of %+v and %+v is better", a, b)
		}
		if betterCluster(a, b) && betterCluster(b, c) && !betterCluster(a, c) {
			t.Fatal("better is not transitive")
		}
		x, y := id("abc"[rapid.IntRange(0, 2).Draw(t, "x")]), id("abc"[rapid.IntRange(0, 2).Draw(t, "y")])
		if x != y && betterFounder(x, y) == betterFounder(y, x) {
			t.Fatal("two founders")
		}
	})
}

// Whatever a node sees, Plan does not panic and always says something.
func FuzzPlan(f *testing.F) {
	f.Add([]byte{1, 2, 3})
	f.Add([]byte("any bytes at all will do, the more the better, since each picks one fact"))
	f.Fuzz(func(t *testing.T, b []byte) {
		i := 0
		pick := func(n int) int {
			if i >= len(b) {
				return 0
			}
			i++
			return int(b[i-1]) % n
		}
		modes := []fleet.FoundingMode{fleet.FoundCentral, fleet.FoundNamed, fleet.FoundFirst, "none"}
		o := site(modes[pick(4)], "abcd"[pick(4)])
		o.Mono = time.Duration(pick(200)) * 5 * time.Second
		step := func() *Step {
			return &Step{Plan: "p", N: uint64(pick(3)), Epoch: uint64(pick(3)), Leader: id("abc"[pick(3)]), Phase: StepPhase(pick(3)), Replace: pick(2) == 1}
		}
		record := func() *Record {
			r := rec(uint64(pick(3)), uint64(pick(3)), []string{"", "a", "ab", "abc", "bc"}[pick(5)])
			r.Into = []string{"", "", "v"}[pick(3)]
			return r
		}
		plan := func() *PlanDoc {
			return &PlanDoc{ID: "p", N: uint64(pick(3)), Epoch: uint64(pick(3)), Leader: id("abc"[pick(3)]), Candidates: []fleet.NodeID{id('b'), id('c')},
				Phase: PlanPhase(pick(6)), Replace: pick(2) == 1, Serial: pick(2) == 1, Go: pick(3), Reopened: pick(3) == 0, Failures: pick(80)}
		}
		d := &o.Disk
		d.Role = Role(pick(5))
		if pick(2) == 1 || d.Role != RoleNone {
			d.Record = record()
		}
		if pick(3) == 0 {
			d.Step = step()
		}
		if pick(3) == 0 {
			d.Lead = &Lead{Plan: "p", Epoch: uint64(pick(3)), Phase: LeadPhase(pick(3))}
		}
		if pick(5) == 0 {
			d.Reset = &Reset{Plan: []string{"", "p"}[pick(2)], To: uint64(pick(4))}
		}
		if pick(5) == 0 {
			d.Intent = &Intent{UID: "u", Boot: "1", Mode: modes[pick(4)]}
		}
		if pick(4) == 0 {
			d.Ack = &Claim{Node: id("abc"[pick(3)])}
		}
		d.Aside, d.Datastore, d.Tombstone, d.ResetFlag, d.AgentCert = pick(6) == 1, pick(2) == 1, pick(6) == 1, pick(6) == 1, pick(2) == 1
		o.K3s = K3s{Process: Process(pick(3)), API: pick(2) == 1, NoInfo: time.Duration(pick(100)) * 10 * time.Second, LedgerFor: time.Duration(pick(100)) * 10 * time.Second}
		if pick(2) == 1 {
			o.K3s.Ledger = &Ledger{Record: *record()}
			if pick(2) == 1 {
				o.K3s.Ledger.Plan = plan()
			}
		}
		for c := range 3 {
			if pick(2) == 1 {
				o.K3s.Members = append(o.K3s.Members, Member{Node: id("abc"[c]), Learner: pick(2) == 1})
			}
			if pick(2) == 1 {
				o.K3s.Nodes = append(o.K3s.Nodes, NodeObject{Node: id("abc"[c]), Ready: pick(2) == 1, For: time.Hour})
			}
			if id("abc"[c]) != o.Self && pick(3) > 0 {
				p := peer("abc"[c], func(s *Status) {
					s.Role, s.API, s.Virgin, s.Voters = Role(pick(4)), pick(2) == 1, pick(2) == 1, pick(4)
					if pick(2) == 1 {
						s.Record = record()
					}
					if pick(3) == 0 {
						s.Plan = plan()
					}
					if pick(3) == 0 {
						s.Step = step()
					}
				})
				p.Age = time.Duration(pick(100)) * time.Second
				o.Peers = append(o.Peers, p)
			}
		}
		s, acts := Plan(t0, o, Policy{})
		if s >= numStates || len(acts) == 0 {
			t.Fatalf("%s with %d actions", s, len(acts))
		}
		for _, a := range acts {
			if a.Reason == "" || a.Kind >= numActions {
				t.Fatalf("%s without a reason", a.Kind)
			}
			if a.Kind == FoundCluster && (d.member() || d.Intent != nil) {
				t.Fatal("founds in spite of a sign of membership")
			}
		}
		AnswerMaterial(o, Policy{}, id('b'), Role(pick(4)), "p", 0)
		AnswerLease(o, Policy{}, id('b'), "p")
	})
}
