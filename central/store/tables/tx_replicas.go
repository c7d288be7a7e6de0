package tables

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/tables/db"
)

const (
	// keepChanges is how many transactions the log of changes holds at least:
	// a process that slept through more of them reads everything again.
	keepChanges = 10000
	// trimChanges is how many are dropped at once.
	trimChanges = 1000
	pageChanges = 1000
)

// changed notes that the transaction writes an object.
func (t *tx) changed(kind store.ChangeKind, tenant, key string) {
	c := store.Change{Kind: kind, Tenant: tenant, Key: key}
	if _, there := t.changes[c]; !there {
		t.changes[c] = struct{}{}
		t.order = append(t.order, c)
	}
}

// Log implements Tx.
func (t *tx) Log(token string) error {
	r, err := t.q.ChangesRange(t.ctx)
	if err != nil {
		return wrap("read", "changes", err)
	}
	body := ""
	if len(t.order) > 0 {
		if body, err = encode("changes", t.order); err != nil {
			return err
		}
	}
	if r.Newest-r.Oldest >= keepChanges+trimChanges {
		if err := t.q.TrimChanges(t.ctx, r.Newest-keepChanges); err != nil {
			return wrap("trim", "changes", err)
		}
	}
	return wrap("write", "changes", t.q.InsertChanges(t.ctx, db.InsertChangesParams{Seq: r.Newest + 1, Token: token, Body: body}))
}

// Logged implements Tx.
func (t *tx) Logged(token string) (bool, error) {
	n, err := t.q.CountChangesByToken(t.ctx, token)
	return n > 0, wrap("read", "changes", err)
}

// LastChange implements Tx.
func (t *tx) LastChange() (uint64, error) {
	r, err := t.q.ChangesRange(t.ctx)
	return uint64(r.Newest), wrap("read", "changes", err)
}

// ChangesAfter implements Tx.
func (t *tx) ChangesAfter(after uint64, own string) (store.Changes, error) {
	out := store.Changes{Last: after}
	var err error
	if out.Epoch, err = t.Epoch(); err != nil {
		return out, err
	}
	r, err := t.q.ChangesRange(t.ctx)
	switch {
	case err != nil:
		return out, wrap("read", "changes", err)
	case uint64(r.Newest) == after:
		return out, nil
	case uint64(r.Newest) < after, uint64(r.Oldest) > after+1:
		// Below: the database is another one, or an older state of it.
		return out, fmt.Errorf("tables: read changes after %d: %w", after, store.ErrForgotten)
	}
	rows, err := t.q.ListChanges(t.ctx, db.ListChangesParams{After: int64(after), Count: pageChanges})
	if err != nil {
		return out, wrap("list", "changes", err)
	}
	for _, r := range rows {
		out.Last = uint64(r.Seq)
		if r.Body == "" || strings.HasPrefix(r.Token, own) {
			continue
		}
		var all []store.Change
		if err := json.Unmarshal([]byte(r.Body), &all); err != nil {
			return out, fmt.Errorf("tables: decode changes: %w", err)
		}
		out.All = append(out.All, all...)
	}
	out.More = len(rows) == pageChanges
	return out, nil
}

// Term implements Tx.
func (t *tx) Term() (uint64, error) {
	n, err := t.number(settingTerm)
	if errors.Is(err, store.ErrNotFound) {
		return 0, nil
	}
	return n, err
}

// NextTerm implements Tx.
func (t *tx) NextTerm() (uint64, error) {
	n, err := t.Term()
	if err != nil {
		return 0, err
	}
	n++
	return n, t.PutSetting(settingTerm, strconv.FormatUint(n, 10))
}
