package tables

import (
	"fmt"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
	"github.com/muster-edge/muster/fleet"
)

func credentialOf(r db.Credential) (store.Credential, error) {
	var c store.Credential
	if err := decode("credential", r.Body, &c); err != nil {
		return c, err
	}
	c.ID, c.Tenant, c.Kind, c.Holder = r.ID, r.Tenant, store.CredentialKind(r.Kind), r.Holder
	c.Created, c.Expires, c.LastUsed, c.Revoked = clock(r.Created), clock(r.Expires), clock(r.LastUsed), clock(r.Revoked)
	c.Idle = time.Duration(r.Idle)
	if err := c.Hash.UnmarshalText([]byte(r.Hash)); err != nil {
		return c, fmt.Errorf("tables: decode credential: %w", err)
	}
	return c, nil
}

func (t *tx) CredentialByHash(hash fleet.Digest) (store.Credential, error) {
	r, err := t.q.GetCredentialByHash(t.ctx, hash.String())
	if err != nil {
		return store.Credential{}, wrap("read", "credential", err)
	}
	return credentialOf(r)
}

func (t *tx) Credential(id string) (store.Credential, error) {
	r, err := t.q.GetCredential(t.ctx, id)
	if err != nil {
		return store.Credential{}, wrap("read", "credential", err)
	}
	return credentialOf(r)
}

func (t *tx) Credentials(tenant string, kind store.CredentialKind, after string, count int) ([]store.Credential, error) {
	if tenant == "" {
		rows, err := t.q.ListCredentials(t.ctx, db.ListCredentialsParams{Kind: string(kind), After: after, Count: int64(count)})
		return list(rows, err, "credentials", credentialOf)
	}
	rows, err := t.q.ListCredentialsOfTenant(t.ctx, db.ListCredentialsOfTenantParams{Tenant: tenant, Kind: string(kind), After: after, Count: int64(count)})
	return list(rows, err, "credentials", credentialOf)
}

func (t *tx) CredentialsOf(holder string, kind store.CredentialKind, count int) ([]store.Credential, error) {
	rows, err := t.q.ListCredentialsOfHolder(t.ctx, db.ListCredentialsOfHolderParams{Holder: holder, Kind: string(kind), Count: int64(count)})
	return list(rows, err, "credentials", credentialOf)
}

func (t *tx) AddCredential(c store.Credential) error {
	body, err := encode("credential", c)
	if err != nil {
		return err
	}
	return wrap("write", "credential", t.q.InsertCredential(t.ctx, db.InsertCredentialParams{
		ID: c.ID, Hash: c.Hash.String(), Tenant: c.Tenant, Kind: string(c.Kind), Holder: c.Holder, Created: stamp(c.Created),
		Expires: stamp(c.Expires), Idle: int64(c.Idle), LastUsed: stamp(c.LastUsed), Body: body,
	}))
}

func (t *tx) UseCredential(id string, at time.Time) error {
	return wrap("use", "credential", t.q.UseCredential(t.ctx, db.UseCredentialParams{ID: id, At: stamp(at)}))
}

func (t *tx) RevokeCredential(id string, at time.Time) error {
	_, err := t.q.RevokeCredential(t.ctx, db.RevokeCredentialParams{ID: id, At: stamp(at)})
	return wrap("revoke", "credential", err)
}

func (t *tx) DropCredentials(kind store.CredentialKind, before time.Time) error {
	return wrap("delete", "credentials", t.q.DropCredentials(t.ctx, db.DropCredentialsParams{Kind: string(kind), Before: stamp(before)}))
}

func bindingOf(r db.Binding) (store.Binding, error) {
	var b store.Binding
	if err := decode("binding", r.Body, &b); err != nil {
		return b, err
	}
	b.Tenant, b.ID, b.Subject, b.Created = r.Tenant, r.ID, r.Subject, clock(r.Created)
	return b, nil
}

func (t *tx) BindingsOf(subject string) ([]store.Binding, error) {
	rows, err := t.q.ListBindingsOfSubject(t.ctx, subject)
	return list(rows, err, "bindings", bindingOf)
}

func (t *tx) Bindings(tenant string) ([]store.Binding, error) {
	rows, err := t.q.ListBindings(t.ctx, tenant)
	return list(rows, err, "bindings", bindingOf)
}

func (t *tx) Binding(tenant, id string) (store.Binding, error) {
	r, err := t.q.GetBinding(t.ctx, db.GetBindingParams{Tenant: tenant, ID: id})
	if err != nil {
		return store.Binding{}, wrap("read", "binding", err)
	}
	return bindingOf(r)
}

func (t *tx) AddBinding(b store.Binding) error {
	body, err := encode("binding", b)
	if err != nil {
		return err
	}
	return wrap("write", "binding", t.q.InsertBinding(t.ctx, db.InsertBindingParams{
		Tenant: b.Tenant, ID: b.ID, Subject: b.Subject, Created: stamp(b.Created), Body: body,
	}))
}

func (t *tx) DropBinding(tenant, id string) error {
	n, err := t.q.DeleteBinding(t.ctx, db.DeleteBindingParams{Tenant: tenant, ID: id})
	if err == nil && n == 0 {
		return fmt.Errorf("tables: delete binding: %w", store.ErrNotFound)
	}
	return wrap("delete", "binding", err)
}

func (t *tx) AddLoginState(l store.LoginState) error {
	return wrap("write", "log-in", t.q.InsertLoginState(t.ctx, db.InsertLoginStateParams{
		Hash: l.Hash.String(), Expires: stamp(l.Expires), Body: string(l.Body),
	}))
}

func (t *tx) TakeLoginState(hash fleet.Digest) (store.LoginState, error) {
	r, err := t.q.GetLoginState(t.ctx, hash.String())
	if err != nil {
		return store.LoginState{}, wrap("read", "log-in", err)
	}
	n, err := t.q.DeleteLoginState(t.ctx, hash.String())
	if err == nil && n == 0 {
		return store.LoginState{}, fmt.Errorf("tables: take log-in: %w", store.ErrNotFound)
	}
	return store.LoginState{Hash: hash, Expires: clock(r.Expires), Body: []byte(r.Body)}, wrap("take", "log-in", err)
}

func (t *tx) DropLoginStates(at time.Time) error {
	return wrap("delete", "log-ins", t.q.DropLoginStates(t.ctx, stamp(at)))
}
