package k3s

import (
	"reflect"
	"strings"
	"testing"

	"github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
)

// The planner writes a plan and believes what it reads back: a field that got
// lost on the way would make it write the same thing for ever.
func TestLedgerCarriesEveryField(t *testing.T) {
	a, b := fleet.NodeID("n-"+strings.Repeat("a", 24)), fleet.NodeID("n-"+strings.Repeat("b", 24))
	want := clusterbootstrap.Ledger{
		Record: clusterbootstrap.Record{UID: "u1", Epoch: 2, Version: 3, Founder: a, Servers: []fleet.NodeID{a}, Into: "v1"},
		Plan: &clusterbootstrap.PlanDoc{ID: "u1-2-1", N: 1, Epoch: 2, Leader: a, Candidates: []fleet.NodeID{b}, Phase: clusterbootstrap.PlanSwitch,
			Replace: true, Serial: true, Go: 1, Reopened: true, Off: true, Failures: 4, Why: "why"},
	}
	for _, v := range []reflect.Value{reflect.ValueOf(*want.Plan), reflect.ValueOf(want.Record)} {
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("the test says nothing about %s.%s", v.Type().Name(), v.Type().Field(i).Name)
			}
		}
	}
	text, err := encodeLedger(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeLedger([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v %+v\nwant %+v %+v", got.Record, got.Plan, want.Record, want.Plan)
	}
}
