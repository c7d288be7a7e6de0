package storetest

import (
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/access"
)

// credentials: what is let in, how long, and what a role hangs on.
func (s *suite) credentials() {
	north, err := fleet.ParseSelector("region=north")
	if err != nil {
		s.Fatal(err)
	}
	scope := access.Binding{Tenant: "one", Role: access.Operator, Sites: north}
	c := store.Credential{
		ID: "c-1", Hash: hash("t"), Tenant: "one", Kind: store.CredentialToken, Holder: "ann", Created: Start, Expires: Start.Add(time.Hour), Idle: time.Minute,
		LastUsed: Start, Name: "ci", Prefix: "muster_abc", Groups: []string{"g"}, Scopes: []access.Binding{scope}, CreatedBy: "user:ann", Source: "192.0.2.1",
	}
	other := store.Credential{ID: "c-2", Hash: hash("u"), Tenant: access.AllTenants, Kind: store.CredentialToken, Holder: "bob", Created: Start}
	b := store.Binding{Binding: scope, ID: "b-1", Subject: "group:g", Created: Start, CreatedBy: "user:ann", Reason: "why"}
	l := store.LoginState{Hash: hash("l"), Expires: Start.Add(time.Minute), Body: []byte("x")}
	s.update(func(t store.Tx) error {
		for _, err := range []error{t.AddCredential(c), t.AddCredential(other), t.AddBinding(b), t.AddLoginState(l)} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddCredential(c) })
	twin := c
	twin.ID = "c-3"
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddCredential(twin) })
	s.want(store.ErrExists, func(t store.Tx) error { return t.AddBinding(b) })
	s.view(func(t store.Reader) error {
		same(s, "credential by hash", c, first(t.CredentialByHash(hash("t"))))
		same(s, "credential", c, first(t.Credential("c-1")))
		same(s, "of the tenant", []store.Credential{c}, first(t.Credentials("one", store.CredentialToken, "", 10)))
		same(s, "of another kind", []store.Credential{}, first(t.Credentials("one", store.CredentialSession, "", 10)))
		same(s, "of all tenants", []store.Credential{c, other}, first(t.Credentials("", store.CredentialToken, "", 10)))
		same(s, "the next page", []store.Credential{other}, first(t.Credentials("", store.CredentialToken, "c-1", 10)))
		same(s, "of the holder", []store.Credential{other}, first(t.CredentialsOf("bob", store.CredentialToken, 10)))
		same(s, "binding", b, first(t.Binding("one", "b-1")))
		same(s, "bindings", []store.Binding{b}, first(t.Bindings("one")))
		same(s, "bindings of the subject", []store.Binding{b}, first(t.BindingsOf("group:g")))
		same(s, "bindings of nobody", []store.Binding{}, first(t.BindingsOf("user:g")))
		return nil
	})
	s.update(func(t store.Tx) error {
		for _, err := range []error{
			t.UseCredential("c-1", Start.Add(time.Second)), t.UseCredential("c-1", Start),
			t.RevokeCredential("c-2", Start.Add(time.Second)), t.RevokeCredential("c-2", Start.Add(time.Hour)),
		} {
			if err != nil {
				return err
			}
		}
		taken, err := t.TakeLoginState(hash("l"))
		same(s, "log-in", l, first(taken, err))
		return err
	})
	s.want(store.ErrNotFound, func(t store.Tx) error { _, err := t.TakeLoginState(hash("l")); return err })
	s.want(store.ErrNotFound, func(t store.Tx) error { return t.DropBinding("two", "b-1") })
	s.view(func(t store.Reader) error {
		used, err := t.Credential("c-1")
		same(s, "last used", Start.Add(time.Second), first(used.LastUsed, err))
		ended, err := t.Credential("c-2")
		same(s, "revoked", Start.Add(time.Second), first(ended.Revoked, err))
		return nil
	})
	s.update(func(t store.Tx) error {
		for _, err := range []error{
			t.DropBinding("one", "b-1"), t.DropCredentials(store.CredentialSession, Start.Add(24*time.Hour)),
			t.DropCredentials(store.CredentialToken, Start.Add(time.Minute)), t.AddLoginState(l), t.DropLoginStates(l.Expires),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	s.want(store.ErrNotFound, func(t store.Tx) error { _, err := t.TakeLoginState(hash("l")); return err })
	s.view(func(t store.Reader) error {
		left, err := t.Credentials("", store.CredentialToken, "", 10)
		same(s, "those that ended are dropped", 1, first(len(left), err))
		return nil
	})
}
