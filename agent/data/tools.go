package data

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxSaid bounds what is kept of what a program says.
const maxSaid = 16 << 10

// Exec runs programs of this host.
type Exec struct{}

// Run implements Tools. The key is in memory only: a memfd that the program
// opens by its number.
func (Exec) Run(ctx context.Context, in, key []byte, program string, args ...string) (string, error) {
	// Formatting a large, slow disk takes minutes.
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, program)
	if key != nil {
		f, err := memory(key)
		if err != nil {
			return "", err
		}
		defer f.Close()
		c.ExtraFiles = []*os.File{f}
	}
	for _, a := range args {
		c.Args = append(c.Args, strings.ReplaceAll(a, KeyFile, "/proc/self/fd/3"))
	}
	if in != nil {
		c.Stdin = bytes.NewReader(in)
	}
	out := &clipped{}
	c.Stdout, c.Stderr = out, out
	c.Env = append(os.Environ(), "LC_ALL=C")
	c.WaitDelay = time.Second
	err := c.Run()
	return string(out.b), err
}

func memory(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("key", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("data: hand over a key: %w", err)
	}
	f := os.NewFile(uintptr(fd), "key")
	if err = f.Chmod(0o600); err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("data: hand over a key: %w", err)
	}
	return f, nil
}

type clipped struct{ b []byte }

// Write implements io.Writer.
func (c *clipped) Write(p []byte) (int, error) {
	c.b = append(c.b, p[:min(len(p), max(0, maxSaid-len(c.b)))]...)
	return len(p), nil
}

// mounted reports whether something is mounted at exactly dir.
func mounted(dir string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 && f[4] == dir {
			return true
		}
	}
	return false
}
