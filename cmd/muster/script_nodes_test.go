package main

import (
	"context"
	"path/filepath"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/sqlite"
	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/fleet"
)

// inStore changes the database of a centre behind its back.
func inStore(ts *testscript.TestScript, dir string, f func(store.Tx) error) {
	s, err := sqlite.Open(context.Background(), sqlite.Config{Path: filepath.Join(ts.MkAbs(dir), "muster.db")})
	ts.Check(err)
	defer s.Close()
	ts.Check(s.Update(context.Background(), f))
}

// enrolled: enrolled DIR NAME SITE makes the seeded machine an active node, as
// collecting its certificate does.
func scriptEnrolled(ts *testscript.TestScript, neg bool, args []string) {
	inStore(ts, args[0], func(t store.Tx) error {
		id := fleet.RequestID(ts.Getenv("ID_" + args[1]))
		r, err := t.Request("default", id)
		if err != nil {
			return err
		}
		seen := r.Revision
		r, _, err = enroll.Approve(time.Now(), r, enroll.Approval{Ruling: enroll.Ruling{Revision: r.Revision, Actor: "user:script"}, Site: args[2], Labels: map[string]string{"rack": "2"}})
		if err != nil {
			return err
		}
		r, _, err = enroll.Issue(time.Now(), r, enroll.Issued{Serial: "0a", LDevIDKey: r.Evidence.LDevIDKey})
		if err != nil {
			return err
		}
		if err := t.PutRequest(r, seen); err != nil {
			return err
		}
		_, err = t.PutNode(fleet.Node{
			ID: r.Node, Tenant: r.Tenant, Words: r.Words, State: fleet.NodeActive, Site: r.Site, Labels: r.Labels, EK: r.Evidence.EK,
			LDevIDKey: r.Evidence.LDevIDKey, Identity: r.Identity, Boot: r.Boot, Request: r.ID, Created: time.Now(),
		})
		return err
	})
}

// isolate: isolate DIR NAME puts the seeded machine's request into quarantine.
func scriptIsolate(ts *testscript.TestScript, neg bool, args []string) {
	inStore(ts, args[0], func(t store.Tx) error {
		r, err := t.Request("default", fleet.RequestID(ts.Getenv("ID_"+args[1])))
		if err != nil {
			return err
		}
		seen := r.Revision
		r, _, err = enroll.Isolate(time.Now(), r, enroll.Ruling{Revision: r.Revision, Actor: "system", Reason: "two places"})
		if err != nil {
			return err
		}
		return t.PutRequest(r, seen)
	})
}
