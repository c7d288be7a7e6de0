package httpboot

import (
	"errors"
	"io"
	"net"
	"testing"
)

func TestLimit(t *testing.T) {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	l := newLimit(ln, 1)
	dial := func() net.Conn {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	// What net/http wants of a connection before it lets the kernel copy.
	if _, ok := first.(io.ReaderFrom); !ok {
		t.Error("a connection hides that it can sendfile")
	}
	dial()
	type accepted struct {
		c   net.Conn
		err error
	}
	second := make(chan accepted)
	accept := func() {
		c, err := l.Accept()
		second <- accepted{c, err}
	}
	go accept()
	select {
	case <-second:
		t.Fatal("two connections have one place")
	default:
	}
	first.Close()
	first.Close() // the place is given back once
	a := <-second
	if a.err != nil {
		t.Fatal(a.err)
	}
	go accept() // it waits for a place
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if b := <-second; !errors.Is(b.err, net.ErrClosed) {
		t.Errorf("after the end: %v", b.err)
	}
	a.c.Close()
}
