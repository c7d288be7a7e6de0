package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/lab"
)

// standIn is the name of the stand-in for k3s, beside this program.
const standIn = "k3s-standin"

// labK3s finds the k3s that nodes run: --k3s, $K3S, k3s on PATH, the stand-in
// beside this program. LAB_STANDIN=1 wants the stand-in. It leaves the path
// empty when there is none.
func labK3s(s *lab.Spec) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	beside := filepath.Join(filepath.Dir(self), standIn)
	switch {
	case s.K3s != "":
	case os.Getenv("LAB_STANDIN") == "1":
		s.K3s = beside
	case os.Getenv("K3S") != "":
		s.K3s = os.Getenv("K3S")
	default:
		if found, err := exec.LookPath("k3s"); err == nil {
			s.K3s = found
		} else if _, err := os.Stat(beside); err == nil {
			s.K3s = beside
		} else {
			return nil
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	version := exec.CommandContext(ctx, s.K3s, "--version")
	version.Env = append(os.Environ(), "LAB_STANDIN=1") // without it the stand-in refuses everything
	out, err := version.Output()
	line, _, _ := strings.Cut(string(out), "\n")
	switch {
	case err != nil:
		return exitError{3, fmt.Errorf("%s --version: %w", s.K3s, err)}
	case strings.TrimSpace(line) == "":
		return exitError{3, errors.New(s.K3s + " --version says nothing")}
	}
	s.K3sVersion = strings.TrimPrefix(strings.TrimSpace(line), "k3s version ")
	// By what it says of itself, so that a renamed one is still no k3s.
	s.StandIn = strings.Contains(strings.ToLower(s.K3sVersion), "stand")
	return nil
}

// terminalWidth is how wide the terminal is that people watch f at; 0 if they
// do not.
func terminalWidth(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	if size.Col == 0 {
		return 80 // it does not know
	}
	return int(size.Col)
}
