// Package local is the agent's door for people on the same machine: a unix
// socket that tells the status, one JSON object for each connection, and takes
// nothing. Only root may open it.
package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// SocketName is the name of the socket in the run directory.
const SocketName = "agent.sock"

const (
	// maxConns bounds connections at a time, limit how long one may take.
	maxConns = 16
	limit    = 5 * time.Second
	// maxAnswer bounds what Ask reads.
	maxAnswer = 4 << 20
)

// Server answers on a socket.
type Server struct {
	// Path is the socket.
	Path string
	// Answer makes what each caller gets.
	Answer func() ([]byte, error)
	Log    *slog.Logger
}

// Run serves until ctx ends. A socket that a killed agent left is replaced.
func (s Server) Run(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(s.Path), 0o755); err != nil {
		return fmt.Errorf("local: listen: %w", err)
	}
	if fi, err := os.Lstat(s.Path); err == nil && fi.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("local: listen: %s is there and is no socket", s.Path)
	}
	if err := os.Remove(s.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("local: listen: %w", err)
	}
	ln, err := net.Listen("unix", s.Path)
	if err != nil {
		return fmt.Errorf("local: listen: %w", err)
	}
	if err := os.Chmod(s.Path, 0o600); err != nil {
		_ = ln.Close()
		return fmt.Errorf("local: listen: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	slots := make(chan struct{}, maxConns)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("local: accept: %w", err)
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer func() { <-slots }()
				s.answer(c)
			}()
		default:
			_ = c.Close()
		}
	}
}

func (s Server) answer(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(limit))
	b, err := s.Answer()
	if err == nil {
		_, err = c.Write(b)
	}
	if err != nil && s.Log != nil {
		s.Log.Debug("status not told", "err", err)
	}
}

// Ask returns what the agent with the socket at path says.
func Ask(ctx context.Context, path string) ([]byte, error) {
	b, _, err := ask(ctx, path)
	return b, err
}

// Process returns the process ID of an agent that answers.
func Process(ctx context.Context, path string) (int, error) {
	_, pid, err := ask(ctx, path)
	return pid, err
}

func ask(ctx context.Context, path string) (answer []byte, pid int, err error) {
	var d net.Dialer
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, 0, fmt.Errorf("local: ask the node agent: %w", err)
	}
	defer c.Close()
	if at, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(at)
	}
	if answer, err = io.ReadAll(io.LimitReader(c, maxAnswer)); err != nil {
		return nil, 0, fmt.Errorf("local: ask the node agent: %w", err)
	}
	if len(answer) == 0 {
		return nil, 0, errors.New("local: ask the node agent: it says nothing")
	}
	if pid, err = listener(c); err != nil {
		return nil, 0, fmt.Errorf("local: ask the node agent: %w", err)
	}
	return answer, pid, nil
}

// listener is who listens at the other end, by the kernel's word.
func listener(c net.Conn) (int, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("it is no unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return int(cred.Pid), nil
}
