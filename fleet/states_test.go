package fleet

import (
	"encoding"
	"fmt"
	"strings"
	"testing"
)

type word interface {
	~uint8
	fmt.Stringer
	encoding.TextMarshaler
}

// wordsOf checks the text forms of an enum both ways.
func wordsOf[T word, P interface {
	*T
	encoding.TextUnmarshaler
}](t *testing.T, kind string, names []string,
) {
	t.Helper()
	seen := map[string]bool{}
	for i, n := range names {
		b, err := T(i).MarshalText()
		if err != nil || string(b) != n || T(i).String() != n || seen[n] {
			t.Errorf("%s %d is written as %q, %v; want %q", kind, i, b, err, n)
		}
		seen[n] = true
		var back T
		if err := P(&back).UnmarshalText(b); err != nil || back != T(i) {
			t.Errorf("%s %q is read as %v, %v", kind, n, back, err)
		}
	}
	if b, err := T(len(names)).MarshalText(); err == nil {
		t.Errorf("%s %d, which does not exist, is written as %q", kind, len(names), b)
	}
	if s := T(200).String(); !strings.Contains(s, "200") {
		t.Errorf("%s 200 is shown as %q", kind, s)
	}
	for _, bad := range []string{"", "x", strings.ToUpper(names[0]), names[0] + " "} {
		var back T
		if err := P(&back).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%s %q is read as %v", kind, bad, back)
		}
	}
}

func TestWordsOfEnums(t *testing.T) {
	wordsOf[RequestState](t, "request state", requestNames[:])
	wordsOf[NodeState](t, "node state", nodeNames[:])
	wordsOf[OrderState](t, "order state", orderNames[:])
	wordsOf[SystemState](t, "system state", systemNames[:])
	wordsOf[IdentityTrust](t, "identity", identityNames[:])
	wordsOf[BootTrust](t, "boot", bootNames[:])
	wordsOf[EventLevel](t, "event level", eventLevelNames[:])
}

// movesOf prints which states can be reached from each, in order.
func movesOf[T word](n int, move func(from, to T) (T, error)) string {
	var b strings.Builder
	for from := range n {
		fmt.Fprintf(&b, "%s ->", T(from))
		for to := range n {
			if got, err := move(T(from), T(to)); err == nil && got == T(to) {
				fmt.Fprintf(&b, " %s", T(to))
			} else if err == nil || got != T(from) {
				fmt.Fprintf(&b, " BAD(%s)", got)
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func TestMoves(t *testing.T) {
	for _, row := range []struct{ name, got, want string }{
		{"request", movesOf(len(requestNames), RequestState.MoveTo), `
pending -> approved rejected expired superseded quarantined
approved -> issued rejected expired superseded quarantined
issued -> rejected superseded quarantined
rejected -> pending superseded
expired -> pending superseded
superseded -> pending
quarantined -> pending rejected superseded
`},
		{"node", movesOf(len(nodeNames), NodeState.MoveTo), `
approved -> active denied
active -> approved denied
denied -> approved
`},
		{"order", movesOf(len(orderNames), OrderState.MoveTo), `
open -> delivered expired withdrawn
delivered -> running done failed expired withdrawn
running -> done failed
done ->
failed ->
expired -> running done failed
withdrawn -> running done failed
`},
	} {
		if want := strings.TrimPrefix(row.want, "\n"); row.got != want {
			t.Errorf("%s moves are\n%swant\n%s", row.name, row.got, want)
		}
	}
}

// A certificate needs a decision: nothing but approved leads to issued, and a
// denied node is never active without a new approval.
func TestNoWayAroundADecision(t *testing.T) {
	for from := range requestNames {
		if _, err := RequestState(from).MoveTo(RequestIssued); (err == nil) != (RequestState(from) == RequestApproved) {
			t.Errorf("%s -> issued: %v", RequestState(from), err)
		}
	}
	for from := range requestNames {
		if _, err := RequestState(from).MoveTo(RequestApproved); (err == nil) != (RequestState(from) == RequestPending) {
			t.Errorf("%s -> approved: %v", RequestState(from), err)
		}
	}
	if _, err := NodeDenied.MoveTo(NodeActive); err == nil {
		t.Error("a denied node becomes active")
	}
}

func TestTrustGrows(t *testing.T) {
	if !(IdentityUnverified < IdentityLab && IdentityLab < IdentityListed && IdentityListed < IdentityHardware) {
		t.Error("identities are not in the order of trust")
	}
	if !(BootUnknown < BootMeasured && BootMeasured < BootEnforced) {
		t.Error("boots are not in the order of trust")
	}
}
