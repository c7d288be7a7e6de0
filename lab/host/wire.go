package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// InsideArgs are the arguments with which the program starts itself again as
// the first process of a node.
var InsideArgs = []string{"lab", "node"}

// tpmDir is where a node's TPM and event log are, seen from inside.
const tpmDir = "/run-tpm"

// Places on a node, seen from inside.
const (
	TPMSocket    = tpmDir + "/tpm"
	EventLogFile = tpmDir + "/binary_bios_measurements"
	// Link is the node's one cable.
	Link = "eth0"
)

// controlFD is the descriptor of the control socket in the first process.
const controlFD = 3

// briefing is what a node's first process is told on standard input.
type briefing struct {
	Name      string `json:"name"`
	MachineID string `json:"machine_id"`
	MAC       string `json:"mac"`
	// Root is an empty directory to build the file tree on.
	Root string `json:"root"`
	// DiskFile or, if that is empty, DiskDir is the node's disk.
	DiskFile string `json:"disk_file"`
	DiskDir  string `json:"disk_dir"`
	// TPM is the directory of the node's TPM on the host.
	TPM      string  `json:"tpm"`
	ClearTPM bool    `json:"clear_tpm"`
	Events   []Event `json:"events"`
	// Address is in CIDR form.
	Address string `json:"address"`
	Gateway string `json:"gateway"`
	// Shared are directories of the host that are seen read-only.
	Shared []string `json:"shared"`
	// Files are written before any program starts.
	Files map[string][]byte `json:"files"`
	// Services are started, and started again when they end.
	Services []Service `json:"services"`
}

// Service is a program that a node runs for as long as it is on.
type Service struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	Env  []string `json:"env"`
}

// request is one message to a node's first process, answer its reply.
type request struct {
	ID      uint64        `json:"id"`
	Op      string        `json:"op"` // exec, start, stop, kill, address
	Argv    []string      `json:"argv,omitempty"`
	Env     []string      `json:"env,omitempty"`
	Service Service       `json:"service,omitzero"`
	Address string        `json:"address,omitempty"`
	Gateway string        `json:"gateway,omitempty"`
	Limit   time.Duration `json:"limit,omitempty"`
}

type answer struct {
	ID     uint64 `json:"id"`
	Error  string `json:"error,omitempty"`
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	Code   int    `json:"code"`
}

// maxOutput caps what is kept of one command's output.
const maxOutput = 4 << 20

// socketPair returns two connected stream sockets; b is for a child.
func socketPair() (a *net.UnixConn, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("host: make control socket: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "control")
	defer f.Close()
	b = os.NewFile(uintptr(fds[1]), "control")
	c, err := net.FileConn(f)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("host: make control socket: %w", err), b.Close())
	}
	return c.(*net.UnixConn), b, nil
}

// caller sends requests to a node and hands the answers out.
type caller struct {
	conn *net.UnixConn

	mu    sync.Mutex
	next  uint64
	open  map[uint64]chan answer
	ended error
}

func newCaller(conn *net.UnixConn) *caller {
	c := &caller{conn: conn, open: map[uint64]chan answer{}}
	go c.listen()
	return c
}

func (c *caller) listen() {
	d := json.NewDecoder(c.conn)
	for {
		var a answer
		err := d.Decode(&a)
		c.mu.Lock()
		if err != nil {
			c.ended = errors.New("host: the node is off")
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				c.ended = fmt.Errorf("host: hear a node: %w", err)
			}
			for _, ch := range c.open {
				close(ch)
			}
			c.open = map[uint64]chan answer{}
			c.mu.Unlock()
			return
		}
		if ch := c.open[a.ID]; ch != nil {
			delete(c.open, a.ID)
			ch <- a
		}
		c.mu.Unlock()
	}
}

// call sends a request; its answer, or the end of the channel when the node
// goes off, comes by the channel.
func (c *caller) call(r request) (<-chan answer, error) {
	ch := make(chan answer, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return nil, c.ended
	}
	c.next++
	r.ID = c.next
	c.open[r.ID] = ch
	b, err := json.Marshal(r)
	if err == nil {
		_, err = c.conn.Write(append(b, '\n'))
	}
	if err != nil {
		delete(c.open, r.ID)
		return nil, fmt.Errorf("host: tell a node: %w", err)
	}
	return ch, nil
}
