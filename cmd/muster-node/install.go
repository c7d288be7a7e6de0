package main

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/agent/member/uplink"
	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/agent/recovery"
	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
)

// recoveryDir holds what a machine in recovery learns; it is in memory.
const recoveryDir = "/run/muster"

// obey is the life of an enrolled machine in recovery: it reports, learns the
// documents of its site, and installs what an order says.
func (e *enroller) obey(ctx context.Context) error {
	s := e.services
	orders, err := statement.ParseKeys([]byte(s.Site.OrdersKeysPEM))
	if err != nil {
		return fmt.Errorf("read the orders keys of site.json: %w", err)
	}
	release, err := statement.ParseKeys([]byte(s.Site.ReleaseKeysPEM))
	if err != nil {
		return fmt.Errorf("read the release keys of site.json: %w", err)
	}
	public, ok := e.tpm.Signer().Public().(*ecdsa.PublicKey)
	if !ok {
		return errors.New("the TPM's LDevID key is no ECDSA key")
	}
	key, err := papers.KeyRef(public)
	if err != nil {
		return err
	}
	docs, err := papers.Open(papers.Config{Dir: filepath.Join(recoveryDir, "papers"), OrdersKeys: orders, Node: e.identity.Node, Key: key, Log: s.Log})
	if err != nil {
		return err
	}
	if _, err := docs.Learn(e.identity.Documents); err != nil {
		s.Log.Warn("documents of the centre were refused", "err", err)
	}
	var in *install.Installer // is there before the first report
	started := s.Why(ctx)
	withdrawn, told := &withdrawnOrders{}, newOutcomes(s.Now)
	up, err := uplink.New(uplink.Config{
		Dir: filepath.Join(recoveryDir, "identity"), Node: e.identity.Node, Key: public, Centres: s.Site.Centre, Identity: &e.identity,
		Image: s.Site.Image + "@" + s.Site.Version, Client: e.client, Learn: docs.Learn,
		Cluster:  func() *musterv1.ClusterReport { return nil },
		System:   func() *musterv1.SystemReport { return e.system(in, started) },
		Outcomes: told.list, Acknowledged: told.acknowledged, News: told.news,
		Standing: func(ids []string) { withdrawn.standing(docs.Orders(s.Now()), ids) },
		Hardware: s.Hardware, Now: s.Now, Log: s.Log,
	})
	if err != nil {
		return err
	}
	disks := func() []fleet.Disk { return s.Hardware().Disks }
	in, err = install.New(install.Config{
		Node: e.identity.Node, Arch: runtime.GOARCH, ReleaseKeys: release,
		Machine: install.Host{Run: recoveryDir, NeedModule: s.NeedModule, Disks: disks}, Disks: disks,
		// Those that ended too: the screen says so.
		Orders:    func() []fleet.Order { return docs.Orders(time.Time{}) },
		Withdrawn: withdrawn.is,
		// Enrollment set the clock from the centre.
		TimeKnown: withdrawn.known, Now: s.Now,
		Sources:  func() []install.Source { return sources(up, s.Site.Centre) },
		HandOver: func() (install.HandOver, string) { return handOver(docs, e.identityFile()) },
		Recovery: func() ([]fleet.ImageRef, string) {
			return recoveryImage(docs.Documents().Charter, s.Site.Image, s.Site.Version)
		},
		Tell: told.tell, Heard: told.heard, Restart: s.Restart, Log: s.Log,
	})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return up.Run(ctx) })
	g.Go(func() error { return in.Run(ctx) })
	g.Go(func() error { return e.show(ctx, up, in) })
	err = g.Wait()
	if ctx.Err() != nil && err == nil {
		err = ctx.Err()
	}
	return err
}

// whyHere reads the disk that is ours for why this machine is in recovery.
func whyHere(module func(string) error) recovery.Started {
	h := install.Host{Run: recoveryDir, NeedModule: module, Disks: func() []fleet.Disk { return facts.Read(os.DirFS("/")).Disks }}
	f := h.Why()
	cause, text := firmware.WhyRecovery(f)
	return recovery.Started{Cause: cause, Text: text, Failed: f.Meta.Failed}
}

// sources are where images come from: the centre that answers, then the others.
func sources(up *uplink.Uplink, all []string) (out []install.Source) {
	client, first := up.HTTP()
	if client == nil {
		return nil
	}
	for _, u := range append([]string{first}, all...) {
		u = strings.TrimRight(u, "/")
		if !slices.ContainsFunc(out, func(s install.Source) bool { return s.Name() == u }) {
			out = append(out, fetch.HTTP{Label: u, Base: u, Client: client})
		}
	}
	return out
}

// recoveryImage names the image that runs here, as the charter has it: it is
// proven on this machine, and belongs on its disk.
func recoveryImage(c *fleet.Charter, name, version string) ([]fleet.ImageRef, string) {
	if c == nil {
		return nil, "the charter of the site did not come"
	}
	if images := c.Recovery(name, version); len(images) > 0 {
		return images, ""
	}
	return nil, "the charter of the site does not have image " + name + "@" + version
}

// system is what the centre is told of this machine's system.
func (e *enroller) system(in *install.Installer, started recovery.Started) *musterv1.SystemReport {
	n := in.Now()
	r := fleet.SystemReport{Node: e.identity.Node, Slot: fleet.SlotRecovery, Image: e.services.Site.Image + "@" + e.services.Site.Version,
		State: fleet.SystemRecovery, Percent: n.Percent, Reason: n.Reason, Target: strings.ReplaceAll(n.Image, " ", "@")}
	switch {
	case n.State != firmware.InstallIdle:
		r.State = fleet.SystemInstalling
	case started.Text != "":
		r.Reason = started.Text
	}
	for _, f := range started.Failed[max(0, len(started.Failed)-fleet.MaxFailedImages):] {
		r.Failed = append(r.Failed, fleet.FailedImage{SHA256: f.Image[:], Image: f.Version, Reason: f.Reason, At: f.At})
	}
	return api.SystemReportToProto(r)
}

// silentAfter is when the screen says that the centre does not answer.
const silentAfter = 5 * time.Minute

// show keeps the screen right.
func (e *enroller) show(ctx context.Context, up *uplink.Uplink, in *install.Installer) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	started, last := time.Now(), ""
	for {
		text := ""
		switch n := in.Now(); {
		case n.State == firmware.WritingSystem:
			text = fmt.Sprintf("installing %s: %d %%. %s", n.Image, n.Percent, n.Reason)
		case n.State != firmware.InstallIdle:
			text = strings.TrimSpace(n.State.String() + " " + n.Image + ": " + n.Reason)
		case time.Since(started) > silentAfter && e.services.Now().Sub(up.State().Heard) > silentAfter:
			text = "the centre does not answer at the moment"
		}
		if text != last {
			last = text
			e.services.Progress(recovery.Progress{State: agent.Enrolled, Request: e.identity.Request, Text: text})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// identityFile is the certificate as the agent of the system keeps it.
func (e *enroller) identityFile() []byte {
	b, err := os.ReadFile(filepath.Join(recoveryDir, "identity", "identity.json"))
	if err != nil {
		e.services.Log.Info("no certificate to hand over", "err", err)
	}
	return b
}

// handOver is what the system is to find on the ESP.
func handOver(docs *papers.Papers, identity []byte) (install.HandOver, string) {
	site, err := os.ReadFile(recovery.SiteFile)
	switch {
	case err != nil:
		return install.HandOver{}, "site.json cannot be read: " + err.Error()
	case len(identity) == 0:
		return install.HandOver{}, "there is no certificate to hand over"
	case docs.Documents().Charter == nil:
		return install.HandOver{}, "the charter of the site did not come yet"
	}
	return install.HandOver{Site: site, Identity: identity, Documents: docs.Envelopes(docs.Refs())}, ""
}

// outcomes are what the centre is to hear of orders, until it acknowledged it.
type outcomes struct {
	now func() time.Time
	mu  sync.Mutex
	all map[string]*musterv1.OrderOutcome
	// fresh is closed when there is something new.
	fresh chan struct{}
}

func newOutcomes(now func() time.Time) *outcomes {
	return &outcomes{now: now, all: map[string]*musterv1.OrderOutcome{}, fresh: make(chan struct{})}
}

func (o *outcomes) tell(id string, state fleet.OrderState, text string) {
	const mostText = 512
	s := musterv1.OrderState_ORDER_STATE_RUNNING
	if state == fleet.OrderDone {
		s = musterv1.OrderState_ORDER_STATE_DONE
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all[id] = &musterv1.OrderOutcome{Id: id, State: s, Text: strings.ToValidUTF8(text[:min(len(text), mostText)], ""), At: timestamppb.New(o.now())}
	close(o.fresh)
	o.fresh = make(chan struct{})
}

func (o *outcomes) list() (out []*musterv1.OrderOutcome) {
	const most = 16
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.all {
		if len(out) < most {
			out = append(out, proto.CloneOf(x))
		}
	}
	return out
}

// acknowledged forgets what the centre has, unless there is something newer.
func (o *outcomes) acknowledged(told []*musterv1.OrderOutcome, ids []string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range told {
		if slices.Contains(ids, x.GetId()) && proto.Equal(x, o.all[x.GetId()]) {
			delete(o.all, x.GetId())
		}
	}
	return nil
}

func (o *outcomes) news() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.fresh
}

// heard waits until everything was acknowledged, or for ctx.
func (o *outcomes) heard(ctx context.Context) {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for {
		o.mu.Lock()
		n := len(o.all)
		o.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
