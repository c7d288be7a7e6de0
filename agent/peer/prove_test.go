package peer

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	peerv1 "github.com/muster-edge/muster/api/peer/v1"
	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
)

const (
	ours    = operatingSystem("ours")
	theirs  = operatingSystem("theirs")
	canary  = "K10abcdef::canary-0123456789"
	aPlan   = "plan-1"
	cluster = "cluster-1"
)

// clock is a clock that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time      { c.mu.Lock(); defer c.mu.Unlock(); return c.now }
func (c *clock) add(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.now = c.now.Add(d) }

// proving is a site with a server that is up and a machine that wants to join.
type proving struct {
	t      *testing.T
	site   *site
	server *machine
	joiner *machine
	clock  *clock
	log    *bytes.Buffer
}

// newProving boots the machine with list; the charter allows ours.
func newProving(t *testing.T, list []measurement) *proving {
	t.Helper()
	p := &proving{t: t, site: newSite(t), clock: &clock{now: time.Now()}, log: &bytes.Buffer{}}
	p.server = newMachine(t, p.site, ours.boot())
	p.joiner = newMachine(t, p.site, list)
	charter := p.site.signCharter(t, func(c *fleet.Charter) {
		c.Lab, c.AnyBoot, c.Images = false, false, []fleet.ImageEvidence{ours.image()}
	})
	admissions := [][]byte{p.site.admission(t, p.server.node, nil), p.site.admission(t, p.joiner.node, nil)}
	for _, n := range []*node{p.server.node, p.joiner.node} {
		n.learn(append([][]byte{charter}, admissions...)...)
	}
	record := clusterbootstrap.Record{UID: cluster, Version: 1, Founder: p.server.id, Servers: []fleet.NodeID{p.server.id}}
	p.server.obs = clusterbootstrap.Observation{
		Disk: clusterbootstrap.Disk{Role: clusterbootstrap.RoleServer, Record: &record,
			Lead: &clusterbootstrap.Lead{Plan: aPlan, Phase: clusterbootstrap.LeadOpen, Candidates: []fleet.NodeID{p.joiner.id}}},
		K3s: clusterbootstrap.K3s{API: true, Ledger: &clusterbootstrap.Ledger{Record: record,
			Plan: &clusterbootstrap.PlanDoc{ID: aPlan, Phase: clusterbootstrap.PlanPrepare, Leader: p.server.id, Candidates: []fleet.NodeID{p.joiner.id}}}},
	}
	p.server.material = func() (Material, error) {
		return Material{Servers: []string{"https://100.96.0.1:6443"}, Token: Secret(canary), Good: 5 * time.Minute, UID: cluster,
			Version: "v1.36.3+k3s1", Args: "ab"}, nil
	}
	edit := func(c *Config) {
		c.Now = p.clock.Now
		c.Log = slog.New(slog.NewTextHandler(&lockedWriter{w: p.log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	p.server.start(edit)
	p.joiner.start(edit)
	return p
}

type lockedWriter struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// answer makes an honest answer to the peer's challenge; edit may change what
// goes into it.
func (p *proving) answer(c *Conn, exporter [exporterLength]byte) *peerv1.AttestRequest {
	p.t.Helper()
	m, err := answerBy(p.t, c.p, c, exporter)
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

// answerBy answers with the TPM of by.
func answerBy(t *testing.T, by *Peer, c *Conn, exporter [exporterLength]byte) (*peerv1.AttestRequest, error) {
	t.Helper()
	id, err := by.identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	challenge, err := c.rpc.Challenge(t.Context(), &peerv1.ChallengeRequest{EkPublic: id.EKs[0].Public, AkPublic: id.AKPublic})
	if err != nil {
		t.Fatal(err)
	}
	return by.attest(id, exporter, c.server, challenge)
}

func TestJoinMaterialForOurOwn(t *testing.T) {
	p := newProving(t, ours.boot())
	c := p.joiner.meet(p.server.node)
	m, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, "")
	if err != nil {
		t.Fatal(err)
	}
	if string(m.Token) != canary || m.Servers[0] != "https://100.96.0.1:6443" || m.Good != 5*time.Minute || m.UID != cluster || m.As != clusterbootstrap.RoleWorker {
		t.Errorf("the material is %+v", m)
	}
	if s := fmt.Sprintf("%v %+v %#v %s %q %x %d", m, m, m, m.Token, m.Token, m.Token, m.Token); strings.Contains(s, "canary") || strings.Contains(s, fmt.Sprintf("%x", canary)) {
		t.Errorf("the token shows itself: %s", s)
	}
	token := m.Token
	m.Wipe()
	if !bytes.Equal(token, make([]byte, len(token))) {
		t.Error("the token is still in memory after Wipe")
	}
	worker := p.server.material
	p.server.material = func() (Material, error) {
		m, err := worker()
		m.AgentToken = Secret("agents-" + canary)
		return m, err
	}
	s, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleServer, aPlan)
	if err != nil || s.Plan != aPlan || s.As != clusterbootstrap.RoleServer || string(s.AgentToken) != "agents-"+canary || s.Version != "v1.36.3+k3s1" || s.Args != "ab" {
		t.Fatalf("%+v, %v", s, err)
	}
	if strings.Contains(p.log.String(), "canary") {
		t.Error("the token is in the log")
	}
	var denied *Denied
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleServer, "plan-2"); !errors.As(err, &denied) || denied.Why == "" {
		t.Errorf("%v, want *Denied", err)
	}
	d, err := c.Lease(t.Context(), aPlan)
	if err != nil || d < 30*time.Second || p.server.notes != 1 {
		t.Errorf("lease of %v, %v, noted %d times", d, err, p.server.notes)
	}
	if _, err := c.Lease(t.Context(), "plan-2"); !errors.As(err, &denied) || p.server.notes != 1 {
		t.Errorf("%v, want *Denied and no note", err)
	}
}

// A reset that begins between the decision and the note takes the grant back.
func TestWhenAResetBeginsBesideALeaseThenThereIsNone(t *testing.T) {
	p := newProving(t, ours.boot())
	c := p.joiner.meet(p.server.node)
	p.server.onNote = func(o *clusterbootstrap.Observation) { o.Disk.Reset = &clusterbootstrap.Reset{Plan: aPlan, To: 1} }
	var denied *Denied
	if _, err := c.Lease(t.Context(), aPlan); !errors.As(err, &denied) {
		t.Errorf("%v, want *Denied", err)
	}
	if p.server.notes != 1 {
		t.Errorf("noted %d times, want 1: the test did not get between", p.server.notes)
	}
}

// The proof ends 60 s after its challenge, and is made again when it is needed.
func TestProofsAge(t *testing.T) {
	p := newProving(t, ours.boot())
	c := p.joiner.meet(p.server.node)
	if err := c.Prove(t.Context()); err != nil {
		t.Fatal(err)
	}
	ask := func() string {
		m, err := c.rpc.JoinMaterial(t.Context(), &peerv1.JoinMaterialRequest{As: peerv1.JoinAs_JOIN_AS_WORKER})
		if err != nil {
			t.Fatal(err)
		}
		return m.GetDenied()
	}
	lease := func() string {
		m, err := c.rpc.Lease(t.Context(), &peerv1.LeaseRequest{Plan: aPlan})
		if err != nil {
			t.Fatal(err)
		}
		return m.GetDenied()
	}
	p.clock.add(clusterbootstrap.MaxQuoteAge)
	if why := ask() + lease(); why != "" {
		t.Errorf("a proof of %s was refused: %s", clusterbootstrap.MaxQuoteAge, why)
	}
	p.clock.add(time.Nanosecond)
	if ask() != noProof || lease() != noProof {
		t.Error("a stale proof was taken")
	}
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); err != nil {
		t.Errorf("it was not proved again: %v", err)
	}
	// A new charter may allow other images.
	p.server.learn(p.site.signCharter(t, func(ch *fleet.Charter) { ch.Policy.PromoteAfter = 61 }))
	if ask() != noProof {
		t.Error("a proof judged by an older charter was taken")
	}
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); err != nil {
		t.Errorf("it was not proved again: %v", err)
	}
	p.server.learn(p.site.signCharter(t, func(ch *fleet.Charter) { ch.Images = []fleet.ImageEvidence{theirs.image()} }))
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); !errors.Is(err, ErrUnproven) {
		t.Errorf("%v, want ErrUnproven: the charter allows this image no longer", err)
	}
}

// Whatever was booted that the charter does not name gets nothing.
func TestStrangerSystems(t *testing.T) {
	with := func(extra ...measurement) []measurement { return append(ours.boot(), extra...) }
	without := func(pcr int) []measurement {
		return slices.DeleteFunc(ours.boot(), func(m measurement) bool { return m.pcr == pcr })
	}
	for name, c := range map[string]struct {
		boot []measurement
		log  func(honest []byte) []byte
		says string
	}{
		"another operating system":                   {boot: theirs.boot(), says: "not ours"},
		"wrong PCR 11":                               {boot: append(without(11), measurement{pcr: 11, data: []byte("other")}), says: "PCR 11"},
		"something was started before the image":     {boot: append([]measurement{{pcr: 4, kind: evApplication, data: []byte("loader")}}, ours.boot()...), says: "not ours"},
		"something was started after the image":      {boot: with(measurement{pcr: 4, kind: evApplication, data: []byte("shell")}), says: "not ours"},
		"a command line from outside":                {boot: with(measurement{pcr: 12, kind: evIPL, data: []byte("init=/bin/sh")}), says: "PCR 12"},
		"firmware that does not measure":             {boot: without(0), says: "did not measure"},
		"there is no log":                            {boot: ours.boot(), log: func([]byte) []byte { return nil }, says: "no event log"},
		"the log is cut":                             {boot: ours.boot(), log: func(b []byte) []byte { return b[:len(b)-1] }, says: "cannot be read"},
		"the log is of another boot":                 {boot: ours.boot(), log: func([]byte) []byte { return encodeLog(theirs.boot()) }, says: "does not replay"},
		"their system with the log of ours (forged)": {boot: theirs.boot(), log: func([]byte) []byte { return encodeLog(ours.boot()) }, says: "does not replay"},
		"a digest in the log is forged": {boot: ours.boot(), log: func(b []byte) []byte {
			a, z := ours.authenticode(), theirs.authenticode()
			return bytes.Replace(b, a[:], z[:], 1)
		}, says: "does not replay"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProving(t, c.boot)
			if c.log != nil {
				honest, forge := p.joiner.log, c.log
				p.joiner.peer.cfg.EventLog = func() ([]byte, error) {
					b, err := honest()
					return forge(b), err
				}
			}
			conn := p.joiner.meet(p.server.node)
			_, err := conn.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, "")
			if !errors.Is(err, ErrUnproven) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v; want ErrUnproven with %q", err, c.says)
			}
			if _, err := conn.Lease(t.Context(), aPlan); !errors.Is(err, ErrUnproven) {
				t.Errorf("lease: %v", err)
			}
			m, err := conn.rpc.JoinMaterial(t.Context(), &peerv1.JoinMaterialRequest{As: peerv1.JoinAs_JOIN_AS_WORKER})
			if err != nil || m.GetDenied() != noProof || len(m.GetToken()) > 0 {
				t.Errorf("without a proof it got %v, %v", m, err)
			}
			// The same machine with our system, a moment later.
			p.joiner.reboot(ours.boot())
			p.joiner.start(nil)
			if _, err := p.joiner.meet(p.server.node).JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); err != nil {
				t.Errorf("the positive twin: %v", err)
			}
		})
	}
}

// A lab charter may ask for nothing; the node must still be the node.
func TestWhenTheCharterAllowsAnyBootThenTheBindingsStillCount(t *testing.T) {
	p := newProving(t, theirs.boot())
	p.server.learn(p.site.signCharter(t, func(c *fleet.Charter) { c.Lab, c.AnyBoot = true, true }))
	c := p.joiner.meet(p.server.node)
	if _, err := c.JoinMaterial(t.Context(), clusterbootstrap.RoleWorker, ""); err != nil {
		t.Error(err)
	}
	m := p.answer(c, [exporterLength]byte{})
	if _, err := c.rpc.Attest(t.Context(), m); err == nil {
		t.Error("a quote of another connection was taken")
	}
}

// hostile are proofs that are good but for one thing.
func TestHostileProofs(t *testing.T) {
	p := newProving(t, ours.boot())
	other := newMachine(t, p.site, ours.boot())
	admission := p.site.admission(t, other.node, nil)
	p.server.learn(admission)
	other.learn(p.site.signCharter(t, nil), admission)
	other.start(nil)
	first := p.joiner.meet(p.server.node)
	c := p.joiner.meet(p.server.node)
	attest := func(m *peerv1.AttestRequest) error {
		_, err := c.rpc.Attest(t.Context(), m)
		return err
	}
	refused := func(t *testing.T, m *peerv1.AttestRequest, why string) {
		t.Helper()
		if err := attest(m); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
		got, err := c.rpc.JoinMaterial(t.Context(), &peerv1.JoinMaterialRequest{As: peerv1.JoinAs_JOIN_AS_WORKER})
		if err != nil || got.GetDenied() != noProof || len(got.GetToken()) > 0 {
			t.Errorf("afterwards it got %v, %v", got, err)
		}
	}
	t.Run("positive twin", func(t *testing.T) {
		if err := attest(p.answer(c, c.exporter)); err != nil {
			t.Fatal(err)
		}
		p.know(nil) // from now on a credential is made
	})
	t.Run("replayed on its own connection", func(t *testing.T) {
		m := p.answer(c, c.exporter)
		if err := attest(m); err != nil {
			t.Fatal(err)
		}
		refused(t, m, "no challenge")
	})
	t.Run("replayed for another challenge", func(t *testing.T) {
		old := p.answer(c, c.exporter)
		p.answer(c, c.exporter)
		refused(t, old, "another transcript")
	})
	t.Run("of another connection", func(t *testing.T) {
		refused(t, p.answer(c, first.exporter), "another transcript")
	})
	t.Run("without a challenge", func(t *testing.T) {
		old := p.answer(first, first.exporter)
		refused(t, old, "no challenge")
	})
	t.Run("stale", func(t *testing.T) {
		m := p.answer(c, c.exporter)
		p.clock.add(clusterbootstrap.MaxQuoteAge + time.Nanosecond)
		refused(t, m, "too old")
	})
	t.Run("by another node's endorsement key", func(t *testing.T) {
		id := identityOf(t, other.device)
		_, err := c.rpc.Challenge(t.Context(), &peerv1.ChallengeRequest{EkPublic: id.EKs[0].Public, AkPublic: id.AKPublic})
		if err == nil || !strings.Contains(err.Error(), "another node") {
			t.Errorf("%v", err)
		}
	})
	t.Run("quoted by another node's TPM", func(t *testing.T) {
		// Its own EK, since the admission wants that; AK, LDevID and quote of
		// the other machine.
		p.know(nil)
		relay := &relayTPM{own: p.joiner.device, other: other.device}
		q := &Peer{cfg: p.joiner.peer.cfg, key: p.joiner.key}
		q.cfg.TPM = relay
		_, err := answerBy(t, q, c, c.exporter)
		if err == nil || !strings.Contains(err.Error(), "activate credential") {
			t.Fatalf("%v: a TPM activated a credential for a key that it does not hold", err)
		}
		relay.pretend = make([]byte, 32)
		m, err := answerBy(t, q, c, c.exporter)
		if err != nil {
			t.Fatal(err)
		}
		refused(t, m, "was not activated")
	})
	t.Run("quoted by a program", func(t *testing.T) {
		p.know(nil)
		forged := newForger(t, p.joiner.device)
		m := forged.answer(t, c, p.joiner)
		refused(t, m, "was not activated")
		// But for the credential it is perfect: it would be taken.
		p.know(forged.akName(t))
		m = forged.answer(t, c, p.joiner)
		if err := attest(m); err != nil {
			t.Errorf("the forged proof fails for another reason than the one tested: %v", err)
		}
		// So it can tell what one more check is for: a key that is not this
		// connection's.
		forged.id.LDevIDPublic = identityOf(t, other.device).LDevIDPublic
		refused(t, forged.answer(t, c, p.joiner), "another key than the LDevID")
		p.know(nil)
	})
	for name, edit := range map[string]struct {
		do  func(m *peerv1.AttestRequest)
		why string
	}{
		"no activation":        {func(m *peerv1.AttestRequest) { m.Activation = nil }, "was not activated"},
		"altered quote":        {func(m *peerv1.AttestRequest) { m.QuoteAttest[60] ^= 1 }, ""},
		"altered signature":    {func(m *peerv1.AttestRequest) { m.QuoteSignature[len(m.QuoteSignature)-1] ^= 1 }, "signature"},
		"altered PCR value":    {func(m *peerv1.AttestRequest) { m.Pcrs[0].Sha256[0] ^= 1 }, "quoted"},
		"certify is the quote": {func(m *peerv1.AttestRequest) { m.CertifyAttest, m.CertifySignature = m.QuoteAttest, m.QuoteSignature }, ""},
		"a PCR twice":          {func(m *peerv1.AttestRequest) { m.Pcrs[1] = m.Pcrs[0] }, "PCR"},
		"many PCRs": {func(m *peerv1.AttestRequest) {
			m.Pcrs = slices.Repeat(m.Pcrs, 10)
		}, "too many"},
		"the LDevID is another key": {func(m *peerv1.AttestRequest) { m.LdevidPublic = identityOf(t, other.device).LDevIDPublic }, ""},
		"a log over the limit":      {func(m *peerv1.AttestRequest) { m.EventLog = make([]byte, maxEventLog+1) }, "too long"},
		"rubbish for a public area": {func(m *peerv1.AttestRequest) { m.LdevidPublic = []byte{0, 1, 2} }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p.know(nil)
			m := p.answer(c, c.exporter)
			edit.do(m)
			refused(t, m, edit.why)
		})
	}
	t.Run("positive twin at the end", func(t *testing.T) {
		if err := attest(p.answer(c, c.exporter)); err != nil {
			t.Fatal(err)
		}
	})
}

// know makes the server believe that an AK is beside the machine's EK.
func (p *proving) know(name []byte) {
	p.server.peer.mu.Lock()
	defer p.server.peer.mu.Unlock()
	p.server.peer.beside[p.joiner.id] = string(name)
}

func identityOf(t *testing.T, d *device.Device) device.Identity {
	t.Helper()
	id, err := d.Identity(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// relayTPM shows its own EK and lets another machine's TPM do the rest.
type relayTPM struct {
	own, other *device.Device
	pretend    []byte
}

func (r *relayTPM) Identity(ctx context.Context) (device.Identity, error) {
	own, err := r.own.Identity(ctx)
	if err != nil {
		return own, err
	}
	id, err := r.other.Identity(ctx)
	id.EKs = own.EKs
	return id, err
}

func (r *relayTPM) ActivateCredential(blob, enc []byte) ([]byte, error) {
	if r.pretend != nil {
		return bytes.Clone(r.pretend), nil
	}
	return r.own.ActivateCredential(blob, enc)
}

func (r *relayTPM) Certify(q [32]byte) (attest, sig []byte, err error) { return r.other.Certify(q) }

func (r *relayTPM) Quote(q [32]byte, pcrs []int) (attest, sig []byte, values map[int][]byte, err error) {
	return r.other.Quote(q, pcrs)
}

// forger is a stranger's system on an admitted machine: it has the TPM's
// LDevID key, and an attestation key of its own making that says what it likes.
type forger struct {
	ak *ecdsa.PrivateKey
	id device.Identity
}

func newForger(t *testing.T, d *device.Device) *forger {
	return &forger{ak: newKey(t), id: identityOf(t, d)}
}

func (f *forger) akPublic(t *testing.T) []byte {
	point, err := f.ak.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	template := tpm.AKTemplate(0)
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	return tpm2.Marshal(template)
}

func (f *forger) akName(t *testing.T) []byte {
	name, err := pki.ComputeName(f.akPublic(t))
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func (f *forger) sign(t *testing.T, a tpm2.TPMSAttest) (attest, sig []byte) {
	attest = tpm2.Marshal(a)
	d := sha256.Sum256(attest)
	r, s, err := ecdsa.Sign(rand.Reader, f.ak, d[:])
	if err != nil {
		t.Fatal(err)
	}
	return attest, tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))}})})
}

// answer claims that our system was booted.
func (f *forger) answer(t *testing.T, c *Conn, m *machine) *peerv1.AttestRequest {
	t.Helper()
	challenge, err := c.rpc.Challenge(t.Context(), &peerv1.ChallengeRequest{EkPublic: f.id.EKs[0].Public, AkPublic: f.akPublic(t)})
	if err != nil {
		t.Fatal(err)
	}
	transcript := quoteFields{Nonce: challenge.GetNonce(), Exporter: c.exporter, EK: f.id.EKs[0].Public, AK: f.akPublic(t), LDevID: f.id.LDevIDPublic,
		Prover: m.key, Verifier: c.server}.transcript()
	header := func(kind tpm2.TPMST) tpm2.TPMSAttest {
		return tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: kind, ExtraData: tpm2.TPM2BData{Buffer: transcript[:]},
			QualifiedSigner: tpm2.TPM2BName{Buffer: pki.OwnerQualifiedName(f.akName(t))}, ClockInfo: tpm2.TPMSClockInfo{Clock: 1000, Safe: true}}
	}
	ldevid, err := pki.ComputeName(f.id.LDevIDPublic)
	if err != nil {
		t.Fatal(err)
	}
	out := &peerv1.AttestRequest{Activation: make([]byte, 32), LdevidPublic: f.id.LDevIDPublic, EventLog: encodeLog(ours.boot())}
	certify := header(tpm2.TPMSTAttestCertify)
	certify.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{
		Name: tpm2.TPM2BName{Buffer: ldevid}, QualifiedName: tpm2.TPM2BName{Buffer: pki.OwnerQualifiedName(ldevid)}})
	out.CertifyAttest, out.CertifySignature = f.sign(t, certify)
	values := pki.Replay(eventsOf(ours.boot()))
	h, bits := sha256.New(), make([]byte, 3)
	for _, i := range slices.Sorted(maps.Keys(values)) {
		if !slices.Contains(pki.QuotePCRs, i) {
			continue
		}
		v := values[i]
		h.Write(v[:])
		bits[i/8] |= 1 << (i % 8)
		out.Pcrs = append(out.Pcrs, &peerv1.PcrValue{Index: uint32(i), Sha256: v[:]})
	}
	quote := header(tpm2.TPMSTAttestQuote)
	quote.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bits}}},
		PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)}})
	out.QuoteAttest, out.QuoteSignature = f.sign(t, quote)
	return out
}

// The planner's word for a missing proof is what the client reacts to.
func TestNoProofIsWhatThePlannerSays(t *testing.T) {
	_, a, _ := pair(t)
	obs, pol := a.Observation()
	if ok, why := clusterbootstrap.AnswerMaterial(obs, pol, a.id, clusterbootstrap.RoleWorker, "", -1); ok || why != noProof {
		t.Errorf("it says %q", why)
	}
}
