package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/internal/flush"
)

// maxFile bounds what is read of each of our small files.
const maxFile = 64 << 10

// Role is what a node runs.
type Role string

const (
	// NoRole: nothing. A missing or unreadable role file means this, too.
	NoRole Role = ""
	// Worker runs `k3s agent`.
	Worker Role = "worker"
	// Candidate runs `k3s server`, but only under a lease.
	Candidate Role = "candidate"
	// Joiner runs `k3s server` and needs no lease: it takes the place of a
	// dead server beside two that have the quorum without it.
	Joiner Role = "joiner"
	// Server runs `k3s server`.
	Server Role = "server"
)

// RoleNote is the role file.
type RoleNote struct {
	Role Role `json:"role"`
	// Plan is the promotion whose lease a candidate needs; "": of any.
	Plan string `json:"plan,omitempty"`
}

// Go is the permission to run k3s in one boot: after power-on nothing runs
// until the node agent has looked whether the data is still good.
type Go struct {
	Boot string `json:"boot"`
}

// Init allows one start with cluster-init. The launcher deletes it before the
// start, so that no second one can follow from it.
type Init struct {
	Boot string `json:"boot"`
}

// Lease is a candidate's right to run k3s.
type Lease struct {
	Plan  string        `json:"plan"`
	Boot  string        `json:"boot"`
	Until time.Duration `json:"until"` // CLOCK_BOOTTIME
}

// MaxLease bounds a lease: one that reaches further is no lease but a mistake.
const MaxLease = 5 * time.Minute

// WriteFile writes v as JSON: all of it or nothing, and flushed. The directory
// is made if need be (0700).
func WriteFile(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("launch: write %s: %w", path, err)
	}
	return WriteBytes(path, append(b, '\n'))
}

// WriteBytes is WriteFile for any content, mode 0600.
func WriteBytes(path string, b []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("launch: write %s: %w", path, err)
	}
	if err := renameio.WriteFile(path, b, 0o600, renameio.IgnoreUmask(), renameio.WithTempDir(dir)); err != nil {
		return fmt.Errorf("launch: write %s: %w", path, err)
	}
	return SyncDir(dir)
}

// Remove deletes a file and flushes that; a missing one is no error.
func Remove(path string) error {
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("launch: delete %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir flushes the names in a directory.
func SyncDir(dir string) error {
	if err := flush.Dir(dir); err != nil {
		return fmt.Errorf("launch: %w", err)
	}
	return nil
}

// ReadFile reads v; fs.ErrNotExist if there is no such file. Torn, foreign and
// oversized ones are errors.
func ReadFile(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("launch: read %s: %w", path, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fmt.Errorf("launch: read %s: %w", path, err)
	}
	if len(b) > maxFile {
		return fmt.Errorf("launch: read %s: larger than %d bytes", path, maxFile)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("launch: read %s: %w", path, err)
	}
	return nil
}

// ReadRole reads the role file; a missing one is NoRole.
func (p Paths) ReadRole() (RoleNote, error) {
	var n RoleNote
	err := ReadFile(p.RoleFile(), &n)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return RoleNote{}, nil
	case err != nil:
		return RoleNote{}, err
	}
	switch n.Role {
	case Worker, Candidate, Joiner, Server:
		return n, nil
	}
	return RoleNote{}, fmt.Errorf("launch: read %s: unknown role %.40q", p.RoleFile(), n.Role)
}

// readLease returns until when the lease for plan holds; 0: none. boot and now
// are the boot and the CLOCK_BOOTTIME in which that is asked.
func (p Paths) readLease(plan, boot string, now time.Duration) time.Duration {
	var l Lease
	if err := ReadFile(p.LeaseFile(), &l); err != nil {
		return 0
	}
	return l.holds(plan, boot, now)
}

func (l Lease) holds(plan, boot string, now time.Duration) time.Duration {
	if plan != "" && l.Plan != plan || l.Boot != boot || l.Until <= now || l.Until-now > MaxLease {
		return 0
	}
	return l.Until
}

// allowed reports whether the go file is of this boot.
func (p Paths) allowed(boot string) bool {
	var g Go
	return ReadFile(p.GoFile(), &g) == nil && g.Boot == boot
}

// initAllowed reports whether the next start may make a cluster.
func (p Paths) initAllowed(boot string) bool {
	var i Init
	return ReadFile(p.InitFile(), &i) == nil && i.Boot == boot
}

// ReadStatus reads what the launcher last said. K3s and Launcher are to be
// checked with Alive.
func (p Paths) ReadStatus() (Status, error) {
	var s Status
	err := ReadFile(p.StatusFile(), &s)
	return s, err
}

// K3s returns the k3s process of this node, or nil if it does not run.
func (p Paths) K3s() *Process {
	var x Process
	if ReadFile(p.ProcessFile(), &x) != nil || !x.Alive() {
		return nil
	}
	return &x
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
