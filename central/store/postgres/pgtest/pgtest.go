// Package pgtest runs a PostgreSQL server of the distribution for tests: in a
// temporary directory, on a Unix socket, as an unprivileged user, sorting by
// other rules than bytes, and gone with the test. Only tests use it.
package pgtest

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/sys/unix"
)

// ErrNone: there is no PostgreSQL on this machine.
var ErrNone = errors.New("pgtest: no PostgreSQL server is installed (apt-get install postgresql-15)")

// Server is a running server.
type Server struct {
	dir    string
	bin    string
	cred   *syscall.SysProcAttr
	admin  *sql.DB
	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
	log    bytes.Buffer
	count  int
}

// Start starts a server; Stop ends it and removes everything.
func Start() (_ *Server, err error) {
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(bins) == 0 {
		if p, err := exec.LookPath("initdb"); err == nil {
			bins = []string{p}
		}
	}
	if len(bins) == 0 {
		return nil, ErrNone
	}
	slices.Sort(bins)
	s := &Server{bin: filepath.Dir(bins[len(bins)-1])}
	// Not below a test's own directory: the server's user may not enter that,
	// and the name of a socket is short.
	if s.dir, err = os.MkdirTemp(roomy(), "pg"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	// PostgreSQL refuses to run as root.
	s.cred = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 {
		u, err := user.Lookup("nobody")
		if err != nil {
			return nil, fmt.Errorf("pgtest: PostgreSQL refuses to run as root: %w", err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		s.cred.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(s.dir, uid, gid); err != nil {
			return nil, err
		}
	}
	initdb := exec.Command(s.bin+"/initdb", "-D", s.data(), "-U", "muster", "--auth=trust", "-E", "UTF8", "--no-sync",
		"--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en")
	if out, err := s.as(initdb).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pgtest: initdb: %w: %s", err, out)
	}
	if err := s.Up(); err != nil {
		return nil, err
	}
	return s, nil
}

// roomy is memory if there is enough of it: the server flushes as it must, and
// a test need not wait for a disk.
func roomy() string {
	const shm = "/dev/shm"
	var fs unix.Statfs_t
	if unix.Statfs(shm, &fs) == nil && uint64(fs.Bsize)*fs.Bavail > 2<<30 {
		return shm
	}
	return ""
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) as(c *exec.Cmd) *exec.Cmd {
	c.SysProcAttr = s.cred
	c.Dir = s.dir
	c.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"}
	return c
}

// Up starts the server again after Down or Crash, and waits until it answers.
func (s *Server) Up() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log.Reset()
	s.cmd = s.as(exec.Command(s.bin+"/postgres", "-D", s.data(), "-c", "listen_addresses=", "-c", "unix_socket_directories="+s.dir,
		"-c", "shared_buffers=32MB", "-c", "max_connections=60"))
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.WaitDelay = time.Second
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("pgtest: start: %w", err)
	}
	exited := make(chan struct{})
	s.exited = exited
	cmd := s.cmd
	go func() { _ = cmd.Wait(); close(exited) }()
	if s.admin == nil {
		d, err := sql.Open("pgx", s.url("postgres"))
		if err != nil {
			return err
		}
		s.admin = d
	}
	end := time.Now().Add(time.Minute)
	for {
		err := s.admin.Ping()
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("pgtest: the server ended: %s", s.log.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(end) {
			return fmt.Errorf("pgtest: the server does not answer: %w", err)
		}
	}
}

// Crash kills the server with all its processes, as a power cut does.
func (s *Server) Crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, _ := os.ReadFile(filepath.Join(s.data(), "postmaster.pid"))
	pid := strconv.Itoa(s.cmd.Process.Pid)
	if !strings.HasPrefix(string(b), pid+"\n") {
		return
	}
	// Backends are its children; they would end by themselves in a moment.
	children, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
	_ = s.cmd.Process.Kill()
	for _, c := range strings.Fields(string(children)) {
		if n, err := strconv.Atoi(c); err == nil {
			_ = syscall.Kill(n, syscall.SIGKILL)
		}
	}
	<-s.exited
}

// Stop ends the server and removes its files.
func (s *Server) Stop() error {
	if s.admin != nil {
		_ = s.admin.Close()
	}
	if s.cmd != nil && s.cmd.Process != nil {
		_ = s.cmd.Process.Signal(syscall.SIGQUIT) // at once, no checkpoint
		select {
		case <-s.exited:
		case <-time.After(10 * time.Second):
			s.Crash()
		}
	}
	return os.RemoveAll(s.dir)
}

func (s *Server) url(database string) string {
	return fmt.Sprintf("postgres://muster@/%s?host=%s", database, s.dir)
}

// Socket is the path of the server's Unix socket.
func (s *Server) Socket() string { return filepath.Join(s.dir, ".s.PGSQL.5432") }

// Database makes an empty database and returns its URL.
func (s *Server) Database(ctx context.Context) (string, error) {
	s.mu.Lock()
	s.count++
	name := fmt.Sprintf("muster%d", s.count)
	s.mu.Unlock()
	if _, err := s.admin.ExecContext(ctx, "CREATE DATABASE "+name); err != nil {
		return "", fmt.Errorf("pgtest: make database: %w", err)
	}
	return s.url(name), nil
}

// Open opens a database for looking into it.
func Open(url string) (*sql.DB, error) { return sql.Open("pgx", url) }

var _ = stdlib.GetDefaultDriver // registers the driver "pgx"

var shared struct {
	once sync.Once
	s    *Server
	err  error
}

// Main runs a package's tests and stops the server they shared.
func Main(m *testing.M) int {
	code := m.Run()
	if shared.s != nil {
		if err := shared.s.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

// Shared is the server that all tests of a package share; it needs Main.
func Shared(t testing.TB) *Server {
	t.Helper()
	shared.once.Do(func() { shared.s, shared.err = Start() })
	if errors.Is(shared.err, ErrNone) {
		t.Skip(shared.err)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.s
}

// URL makes a database on the shared server.
func URL(t testing.TB) string {
	t.Helper()
	url, err := Shared(t).Database(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return url
}
