package service

import (
	"context"
	"errors"
)

// errBusy says that the queue before the workers is full.
var errBusy = errors.New("service: busy")

// pool lets a bounded number of callers work and a bounded number wait.
type pool struct{ waiting, working chan struct{} }

func newPool(workers, queue int) *pool {
	return &pool{waiting: make(chan struct{}, workers+queue), working: make(chan struct{}, workers)}
}

// do runs f in the caller's goroutine as soon as a worker's place is free. The
// error is errBusy, ctx's, or f's.
func (p *pool) do(ctx context.Context, f func() error) error {
	select {
	case p.waiting <- struct{}{}:
		defer func() { <-p.waiting }()
	default:
		return errBusy
	}
	select {
	case p.working <- struct{}{}:
		defer func() { <-p.working }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return f()
}
