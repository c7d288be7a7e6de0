package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"time"

	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/agent/member"
	"github.com/muster-edge/muster/agent/member/uplink"
	"github.com/muster-edge/muster/agent/peer"
	"github.com/muster-edge/muster/agent/slots"
	"github.com/muster-edge/muster/agent/slots/metal"
	"github.com/muster-edge/muster/agent/spool"
	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	cb "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/fleet/turns"
)

// system is the agent's part for its own system: nothing of it exists where no
// slot runs, as in the host lab.
type system struct {
	keeper *slots.Keeper
	box    *box
	m      *member.Member
	p      parts
	up     *uplink.Uplink
	k      *k3s.Turns
	turns  *slots.Turns
	key    *diskKey
	images *metal.Images
	// team are the peers as sources of images, lib what they find here.
	team  *fetch.Team
	mates *peer.Mates
	lib   *metal.Library
	paths k3s.Paths
	log   *slog.Logger
	start time.Duration
}

// askLimit bounds a question to the centre in the middle of a plan.
const askLimit = 20 * time.Second

// steady is how long k3s must have run to count as one that stays up.
const steady = time.Minute

// newSystem is nil without error where no slot runs.
func (a *nodeAgent) newSystem(p parts, m *member.Member, up *uplink.Uplink) (*system, error) {
	b, err := openBox(a.o.paths.Run)
	if errors.Is(err, disk.ErrNoSlot) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	keys, err := statement.ParseKeys([]byte(p.site.ReleaseKeysPEM))
	if err != nil {
		return nil, fmt.Errorf("muster-node: site.json of this image has no release key, so that no update can be believed: %w", err)
	}
	s := &system{box: b, m: m, p: p, up: up, paths: a.o.paths.WithDefaults(), log: a.log, start: member.Boottime()}
	s.k = &k3s.Turns{Paths: s.paths, Now: p.clock.now}
	s.turns = slots.NewTurns(slots.TurnsConfig{
		Self: p.id, Cluster: s.k, Clustered: s.clustered, Worker: s.worker, Ask: m.AskTurn, Policy: s.policy, Busy: s.busy,
		SnapshotTaken: s.snapshotTaken, TakeSnapshot: m.TakeUpdateSnapshot, Now: p.clock.now, Mono: member.Boottime, Log: a.log,
	})
	s.key = &diskKey{
		read: func() ([]byte, error) { return metal.Shelf{Dir: espDir(a.o.paths.Run)}.Get(data.KeyBlob) },
		give: m.EscrowDiskKey, note: filepath.Join(a.o.paths.State, "disk-key.kept"),
		say: func(err error) {
			if err != nil {
				a.log.Warn("the recovery key of the disk is not kept everywhere", "err", err)
			}
		},
	}
	s.images = &metal.Images{Dir: filepath.Join(a.o.paths.State, "images"), ReleaseKeys: keys, Arch: runtime.GOARCH, Parts: b.sys.Parts,
		Fetcher: s.fetcher, Manifest: s.manifest, WriteSlot: install.WriteSlot}
	s.team = &fetch.Team{Self: string(p.id), Mates: func() []fetch.Mate { return s.mates.List() }} // mates are there before anything runs
	s.lib = &metal.Library{Images: s.images, ESP: espDir(a.o.paths.Run), Team: s.team, Slots: func() [2]firmware.Slot { return s.keeper.Now().Slots }}
	s.keeper, err = slots.New(slots.Config{
		Record: b.record(), ESP: b.esp, Loader: metal.Loader{}, Images: s.images, Running: b.running,
		Site:   s.turns,
		Health: s.health, Gate: firmware.Gate{Deadline: a.o.healthDeadline}, Wanted: s.wanted, Target: s.target, Done: s.done,
		Dir: filepath.Join(a.o.paths.State, "slots"), Run: a.o.paths.Run, Tells: m.Tell, Log: a.log,
	})
	return s, err
}

func (s *system) charter() *fleet.Charter { return s.p.papers.Documents().Charter }

func (s *system) policy() fleet.UpdatePolicy {
	if c := s.charter(); c != nil {
		return c.UpdatePolicy()
	}
	return fleet.DefaultUpdate()
}

func (s *system) clustered() bool {
	_, role := s.m.Observed()
	return role != cb.RoleNone
}

// worker: a kubelet may not write the turns of the site.
func (s *system) worker() bool {
	_, role := s.m.Observed()
	return role == cb.RoleWorker
}

// giveTurn asks the cluster for another node.
func (a *nodeAgent) giveTurn(ctx context.Context, node fleet.NodeID, ask turns.Ask) (turns.Reply, error) {
	a.mu.Lock()
	s := a.system
	a.mu.Unlock()
	if s == nil {
		return turns.Reply{}, fmt.Errorf("%w: this node runs no system of its own", turns.ErrDenied)
	}
	return s.turns.For(ctx, node, ask)
}

// busy: servers change while a plan, a lease or a reset is under way.
func (s *system) busy() string {
	k, role := s.m.Observed()
	switch {
	case role == cb.RoleCandidate:
		return "this node is becoming a server"
	case k.Ledger != nil && k.Ledger.Plan.Active():
		return "the cluster is changing its servers"
	case s.team.Serving(time.Now()):
		return "other nodes are fetching images from this node"
	}
	return ""
}

func (s *system) snapshotTaken(image string) bool {
	_, role := s.m.Observed()
	return role != cb.RoleServer || s.m.HasUpdateSnapshot(image)
}

// health are the facts of the gate, all of them about this box.
func (s *system) health(ctx context.Context) firmware.Health {
	k, role := s.m.Observed()
	ready, answers := s.k.OwnReady(ctx, s.p.id)
	h := firmware.Health{Up: member.Boottime(), RootVerified: true, Identity: true, Wanted: role != cb.RoleNone,
		Process: k.Process != cb.ProcessNone && k.Running >= steady, NodeReady: ready, APIReachable: answers,
		Server: role == cb.RoleServer, Quorum: k.API}
	for _, x := range k.Members {
		h.Member = h.Member || x.Node == s.p.id && !x.Learner
	}
	r, err := data.ReadReport(dataReport())
	h.DataMounted = err == nil && (r.State == data.Mounted || r.State == "")
	return h
}

func (s *system) wanted(ctx context.Context) slots.Wanted {
	var w slots.Wanted
	c := s.charter()
	now := s.p.clock.now()
	w.Orders = s.p.papers.Orders(now)
	if c == nil || c.Stack == nil {
		return w
	}
	w.Stack = fmt.Sprintf("%x", []byte(c.Stack.SHA256))
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	ref, err := s.images.Stack(ctx, *c.Stack, c.Tenant)
	if err != nil {
		w.Why = "The stack version " + c.Stack.ID() + " is not known in full yet: " + err.Error()
		return w
	}
	w.Image = ref
	return w
}

// target is what a manifest says. A centre that is silent must not keep the
// running system from being judged.
func (s *system) target(ctx context.Context, ref fleet.ImageRef) (firmware.Target, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return s.images.Target(ctx, ref)
}

func (s *system) done(o fleet.Order, text string) error {
	_, err := s.p.spool.Keep(spool.Entry{Time: s.p.clock.now(), Kind: member.OutcomeKind, Object: o.ID, Text: text, Fields: map[string]string{"state": "done"}})
	return err
}

func (s *system) sources() []fetch.Source {
	var out []fetch.Source
	if c, base, ok := s.up.Files(); ok {
		out = append(out, fetch.HTTP{Label: "centre", Base: base, Client: c})
	}
	return out
}

func (s *system) fetcher() *fetch.Fetcher {
	return &fetch.Fetcher{Team: s.team, Sources: s.sources, Rate: s.policy().RateKbit * 1000 / 8, Log: s.log,
		Progress: func(_, _ int64, waiting string) { s.keeper.Waiting(waiting) }}
}

func (s *system) manifest(ctx context.Context, image firmware.Digest) ([]byte, error) {
	var problems []error
	for _, x := range metal.Few(s.team) {
		asks, ok := x.(interface {
			Manifest(ctx context.Context, image fetch.Digest) ([]byte, error)
		})
		if !ok {
			continue
		}
		mctx, cancel := context.WithTimeout(ctx, metal.MateTime)
		b, err := asks.Manifest(mctx, image)
		cancel()
		if err == nil {
			var m firmware.Manifest
			if m, err = firmware.OpenManifest(b, s.images.ReleaseKeys); err == nil && m.SHA256 == image {
				return b, nil
			}
			err = fmt.Errorf("%s gave another manifest: %w", x.Name(), errors.Join(err))
		}
		problems = append(problems, err)
	}
	for _, x := range s.sources() {
		h, ok := x.(fetch.HTTP)
		if !ok {
			continue
		}
		b, err := h.Manifest(ctx, image, fleet.MaxManifest)
		if err == nil {
			return b, nil
		}
		problems = append(problems, err)
	}
	return nil, errors.Join(append([]error{errors.New("nobody who has the manifest can be asked")}, problems...)...)
}

// report is what the centre is told.
func (s *system) report() *musterv1.SystemReport {
	var stack *fleet.StackRef
	if c := s.charter(); c != nil {
		stack = c.Stack
	}
	var warnings []string
	if r, err := data.ReadReport(dataReport()); err == nil && r.State != "" && (!r.Encrypted || r.Escrow == data.EscrowNone || r.Help != "") {
		warnings = append(warnings, r.Reason)
	}
	return api.SystemReportToProto(s.keeper.Now().Report(stack, warnings))
}
