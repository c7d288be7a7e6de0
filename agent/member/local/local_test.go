package local

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// serve runs a server until the test ends, and waits until it listens.
func serve(t *testing.T, s Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	for ctx.Err() == nil {
		if c, err := net.Dial("unix", s.Path); err == nil {
			_ = c.Close()
			return
		}
		select {
		case err := <-ended:
			t.Fatalf("run: %v", err)
		default:
		}
	}
}

func TestAsk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", SocketName)
	if _, err := Process(t.Context(), path); err == nil {
		t.Fatal("nobody answers, and a process")
	}
	if _, err := Ask(t.Context(), path); err == nil {
		t.Fatal("nobody answers, and no error")
	}
	// What a killed agent leaves behind.
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	answer, fail := []byte(`{"node":"n"}`), error(nil)
	serve(t, Server{Path: path, Answer: func() ([]byte, error) { return answer, fail }})
	b, err := Ask(t.Context(), path)
	if err != nil || string(b) != string(answer) {
		t.Fatalf("%q, %v", b, err)
	}
	if pid, err := Process(t.Context(), path); err != nil || pid != os.Getpid() {
		t.Errorf("process %d, %v", pid, err)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: everybody may ask", fi.Mode(), err)
	}
}

func TestWhatIsNoSocketStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), SocketName)
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Server{Path: path, Answer: func() ([]byte, error) { return nil, errors.New("no") }}.Run(t.Context())
	if err == nil {
		t.Fatal("a file was replaced")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("the file is %q, %v", b, err)
	}
}
