package httpboot

import (
	"net"
	"sync"
)

// limit bounds the number of open connections, as netutil.LimitListener does.
// That one hides that a connection is TCP, and with it the kernel's sendfile:
// a download then costs three times the processor time.
type limit struct {
	*net.TCPListener
	slots chan struct{}
	once  sync.Once
	done  chan struct{}
}

func newLimit(ln *net.TCPListener, n int) *limit {
	return &limit{TCPListener: ln, slots: make(chan struct{}, n), done: make(chan struct{})}
}

// Accept waits for a free place, then for a connection.
func (l *limit) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.AcceptTCP()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &placed{TCPConn: c, free: sync.OnceFunc(func() { <-l.slots })}, nil
}

// Close ends Accept, also one that waits for a place.
func (l *limit) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.TCPListener.Close()
}

// placed is a connection with a place. Its ReadFrom is that of TCP, which is
// what net/http asks for before it uses sendfile.
type placed struct {
	*net.TCPConn
	free func()
}

// Close gives the place back.
func (p *placed) Close() error {
	err := p.TCPConn.Close()
	p.free()
	return err
}
