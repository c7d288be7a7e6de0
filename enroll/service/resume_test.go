package service_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"testing"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// A resumed TLS session is another connection: it has an exporter of its own
// (RFC 8446 §7.5 takes the transcript in), so that a challenge of the session
// before is worth nothing on it.
func TestWhenASessionIsResumedThenTheChallengeIsNotCarriedOver(t *testing.T) {
	m := newMachine(t, swtpmtest.Options{})
	c := newCentre(t, options{roots: m.tpm.CA})
	sessions := tls.NewLRUClientSessionCache(4)
	one := c.dialWith(t, sessions)
	a := one.begin(t, m) // reads the session ticket as well
	two := c.dialWith(t, sessions)
	if one.resumed || !two.resumed {
		t.Fatalf("resumed: %v, then %v", one.resumed, two.resumed)
	}
	if bytes.Equal(one.exporter, two.exporter) {
		t.Fatal("both connections have one exporter")
	}
	_, err := two.rpc.Complete(context.Background(), a.message(t))
	refused(t, err, connect.CodeFailedPrecondition, "begin-again")
	// Nor if everything else is made for the new connection.
	a.fields.Exporter = two.exporter
	_, err = two.complete(t, a)
	refused(t, err, connect.CodeFailedPrecondition, "begin-again")
	c.none()
	// The twin: a challenge of the resumed connection itself is good.
	_, err = two.complete(t, two.begin(t, m))
	must(t, err)
	c.only()
}
