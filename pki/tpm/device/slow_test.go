package device_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
	"github.com/muster-edge/muster/pki/tpm/swtpmtest"
)

// maxCommands bounds the TPM commands of one enrollment. A discrete TPM takes
// up to some 200 ms for each, so every command is seen by whoever waits.
const maxCommands = 30

// TestEnrollmentOnASlowTPM does the TPM's part of an enrollment with 200 ms
// per command, and prints what it took.
func TestEnrollmentOnASlowTPM(t *testing.T) {
	s := swtpmtest.Start(t, swtpmtest.Options{})
	u, err := linuxudstpm.Open(s.Path())
	if err != nil {
		t.Fatal(err)
	}
	slow := &swtpmtest.Slow{TPMCloser: u, Delay: 200 * time.Millisecond}
	if testing.Short() {
		slow.Delay = 0
	}
	d, err := device.OpenTransport(slow, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	total, took := 0, time.Duration(0)
	report := func(step string) {
		commands, elapsed := slow.Commands()
		total, took = total+len(commands), took+elapsed
		t.Logf("%-20s %2d commands, %5.1f s: %s", step, len(commands), elapsed.Seconds(), count(commands))
	}
	report("open")
	id, err := d.Identity(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	report("identity")
	ek, ak := parse(t, id.EKs[0].Public), parse(t, id.AKPublic)
	secret := bytes.Repeat([]byte{7}, 32)
	blob, enc, err := tpm.MakeCredential(rand.Reader, ek, ak.Name, secret)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := d.ActivateCredential(blob, enc); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("activation: %v", err)
	}
	report("activate credential")
	digest := sha256.Sum256([]byte("transcript"))
	if _, _, err := d.Certify(digest); err != nil {
		t.Fatal(err)
	}
	report("certify")
	if _, _, _, err := d.Quote(digest, pki.QuotePCRs); err != nil {
		t.Fatal(err)
	}
	report("quote")
	if _, err := d.Signer().Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	report("sign (each)")
	t.Logf("together %d commands, %.1f s", total, took.Seconds())
	if total > maxCommands {
		t.Errorf("%d commands, at most %d", total, maxCommands)
	}
}

func count(commands []string) string {
	n := map[string]int{}
	for _, c := range commands {
		n[c]++
	}
	var out []string
	for c, k := range n {
		out = append(out, fmt.Sprintf("%d %s", k, c))
	}
	sort.Strings(out)
	return strings.Join(out, ", ")
}
