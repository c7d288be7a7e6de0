package netns

import (
	"context"
	"io"
	"net"
	"os"
	"testing"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// What is sent comes back, the end of one direction is passed on, and nothing
// goes on when the context ends.
func TestForward(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("entering a network namespace needs root")
	}
	echo := listen(t)
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	front := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Forward(ctx, front, os.Getpid(), echo.Addr().String(), func(err error) { t.Error(err) })
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	open, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", front.Addr().String()); err == nil {
		t.Error("it still listens")
	}
}

func TestForwardTellsWhatFails(t *testing.T) {
	front := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failed := make(chan error, 1)
	ended := make(chan error, 1)
	go func() {
		// No process has this number: pid_max is below it.
		ended <- Forward(ctx, front, 1<<30, "127.0.0.1:1", func(err error) { failed <- err })
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-failed; err == nil {
		t.Error("no error")
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
