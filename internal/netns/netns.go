// Package netns connects from the network of another process. Linux only; the
// caller needs CAP_SYS_ADMIN over that network (setns(2)).
package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Dial connects from the network of process pid to an address, which has an IP
// address and no name.
func Dial(ctx context.Context, pid int, network, address string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	ch := make(chan result, 1)
	go func() {
		// The thread is in the other network from here on: it serves nobody
		// else and ends with this goroutine.
		runtime.LockOSThread()
		var r result
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			err = errors.Join(unix.Setns(int(f.Fd()), unix.CLONE_NEWNET), f.Close())
		}
		if err == nil {
			// With one address there is no second attempt on another thread.
			r.c, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		}
		r.err = err
		ch <- r
	}()
	r := <-ch
	if r.err != nil {
		return nil, fmt.Errorf("netns: dial from process %d: %w", pid, r.err)
	}
	return r.c, nil
}

// Forward passes every connection that ln takes on to address in the network
// of process pid, until ctx is cancelled; it closes ln and waits for all of
// them. failed hears of each connection that could not be made; it may be nil.
func Forward(ctx context.Context, ln net.Listener, pid int, address string, failed func(error)) error {
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer wg.Wait()
	defer cancel()
	defer ln.Close()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("netns: accept: %w", err)
		}
		wg.Go(func() {
			defer c.Close()
			to, err := Dial(ctx, pid, "tcp", address)
			if err != nil {
				if failed != nil && ctx.Err() == nil {
					failed(err)
				}
				return
			}
			defer to.Close()
			end := context.AfterFunc(ctx, func() { _, _ = c.Close(), to.Close() })
			defer end()
			back := make(chan struct{})
			go func() {
				defer close(back)
				copyHalf(c, to)
			}()
			copyHalf(to, c)
			<-back
		})
	}
}

// copyHalf copies one direction and passes its end on.
func copyHalf(to, from net.Conn) {
	_, _ = io.Copy(to, from)
	if t, ok := to.(*net.TCPConn); ok {
		_ = t.CloseWrite()
	}
}
