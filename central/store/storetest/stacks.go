package storetest

import (
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/rollout"
)

// stacks: blobs, systems, stacks and their versions, and rollouts are kept by
// tenant, written only over what was read, and gone when they were deleted.
func (s *suite) stacks() {
	now := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	sum := hash("a file")
	node := Node("one", "a")
	version := store.StackVersion{Tenant: "one", Stack: "shop", Version: "1", SHA256: sum[:], Published: now, By: "user:a", KeyID: "k", Envelope: []byte("{}")}
	stack := fleet.Stack{Meta: fleet.Meta{Tenant: "one", Name: "shop", Generation: 1}, Title: "Tills"}
	roll := rollout.Rollout{
		Meta: fleet.Meta{Tenant: "one", Name: "r"}, Plan: rollout.Plan{Stack: fleet.StackRef{Name: "shop", Version: "1", SHA256: sum[:]}, Waves: []rollout.Wave{{Percent: 100}}},
		By: "user:a", Sites: []rollout.Site{{Name: "shop-7", State: rollout.SiteAssigned, Since: now, Assigned: now}},
	}
	system := fleet.SystemReport{Tenant: "one", Site: "shop-7", At: now, Slot: fleet.SlotA, Image: "system@1", State: fleet.SystemCurrent}
	blob := store.Blob{Tenant: "one", SHA256: sum[:], Size: 5, Stored: now, By: "user:a"}
	s.update(func(t store.Tx) error {
		if _, err := t.PutSite(Site("one", "shop-7")); err != nil {
			return err
		}
		var err error
		node.Site = "shop-7"
		if node, err = t.PutNode(node); err != nil {
			return err
		}
		system.Node = node.ID
		if stack, err = t.PutStack(stack); err != nil {
			return err
		}
		if roll, err = t.PutRollout(roll); err != nil {
			return err
		}
		if err := t.AddBlob(blob); err != nil {
			return err
		}
		if err := t.PutSystem(system); err != nil {
			return err
		}
		return t.AddStackVersion(version)
	})
	s.reopen()
	s.view(func(t store.Reader) error {
		same(s.T, "blob", blob, first(t.Blob("one", sum[:])))
		same(s.T, "bytes", int64(5), first(t.BlobBytes("one")))
		same(s.T, "stack", stack, first(t.Stack("one", "shop")))
		same(s.T, "stacks", []fleet.Stack{stack}, first(t.Stacks("one")))
		same(s.T, "version", version, first(t.StackVersion("one", "shop", "1")))
		same(s.T, "version by digest", version, first(t.StackVersionBySHA256("one", sum[:])))
		same(s.T, "versions", []store.StackVersion{version}, first(t.StackVersions("one", "shop")))
		same(s.T, "system", system, first(t.System("one", node.ID)))
		same(s.T, "systems of the site", []fleet.SystemReport{system}, first(t.SystemsOfSite("one", "shop-7")))
		same(s.T, "rollout", roll, first(t.Rollout("one", "r")))
		same(s.T, "rollouts", []rollout.Rollout{roll}, first(t.Rollouts("one")))
		same(s.T, "running rollouts", []rollout.Rollout{roll}, first(t.RolloutsOfState(rollout.Running)))
		same(s.T, "rollouts that are done", []rollout.Rollout{}, first(t.RolloutsOfState(rollout.Done)))
		// Of another tenant there is nothing.
		same(s.T, "foreign stacks", []fleet.Stack{}, first(t.Stacks("two")))
		same(s.T, "foreign rollouts", []rollout.Rollout{}, first(t.Rollouts("two")))
		same(s.T, "foreign bytes", int64(0), first(t.BlobBytes("two")))
		return nil
	})
	for what, f := range map[string]func(store.Tx) error{
		"blob":    func(t store.Tx) error { _, err := t.Blob("two", sum[:]); return err },
		"stack":   func(t store.Tx) error { _, err := t.Stack("two", "shop"); return err },
		"version": func(t store.Tx) error { _, err := t.StackVersion("two", "shop", "1"); return err },
		"rollout": func(t store.Tx) error { _, err := t.Rollout("two", "r"); return err },
		"system":  func(t store.Tx) error { _, err := t.System("two", node.ID); return err },
		"gone":    func(t store.Tx) error { return t.DeleteStackVersion("two", "shop", "1") },
	} {
		s.Log(what)
		s.want(store.ErrNotFound, f)
	}
	// What exists is not made twice, and what was written since is not replaced.
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddBlob(blob) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddStackVersion(version) })
	for _, revision := range []int64{0, 7} {
		want := store.ErrConflict
		if revision == 0 {
			want = store.ErrExists
		}
		s.want(want, func(t store.Tx) error { v := stack; v.Revision = revision; _, err := t.PutStack(v); return err })
		s.want(want, func(t store.Tx) error { v := roll; v.Revision = revision; _, err := t.PutRollout(v); return err })
	}
	s.want(store.ErrConflict, func(t store.Tx) error { return t.DeleteStack("one", "shop", 7) })
	s.want(store.ErrConflict, func(t store.Tx) error { return t.DeleteRollout("one", "r", 7) })
	s.want(store.ErrConflict, func(t store.Tx) error { return t.DeleteSite("one", "shop-7", 7) })
	s.update(func(t store.Tx) error {
		v := roll
		v.State, v.Reason = rollout.Stopped, "x"
		if _, err := t.PutRollout(v); err != nil {
			return err
		}
		if err := t.DeleteStackVersion("one", "shop", "1"); err != nil {
			return err
		}
		return t.DeleteStack("one", "shop", stack.Revision)
	})
	s.want(store.ErrNotFound, func(t store.Tx) error { _, err := t.Stack("one", "shop"); return err })
	s.view(func(t store.Reader) error {
		same(s.T, "running rollouts", []rollout.Rollout{}, first(t.RolloutsOfState(rollout.Running)))
		return nil
	})
	s.update(func(t store.Tx) error { return t.DeleteRollout("one", "r", roll.Revision+1) })
	s.want(store.ErrNotFound, func(t store.Tx) error { _, err := t.Rollout("one", "r"); return err })
}
