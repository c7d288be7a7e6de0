package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// maxMessage caps one QMP message. The longest ones we cause have a few
// kilobytes.
const maxMessage = 1 << 20

// qmpTimeout is for one command whose context has no earlier end.
const qmpTimeout = 20 * time.Second

// Event is something QEMU tells unasked: RESET, SHUTDOWN, POWERDOWN, STOP...
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data,omitempty"`
	At   time.Time       `json:"-"`
}

// QMPError is QEMU's refusal of a command.
type QMPError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *QMPError) Error() string {
	return fmt.Sprintf("machine: QMP %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// QMP is a client of QEMU's machine protocol (docs/interop/qmp-spec.txt of
// QEMU): one JSON object per line, answers matched by ID, events in between.
type QMP struct {
	conn    net.Conn
	onEvent func(Event)

	mu      sync.Mutex
	nextID  uint64
	waiting map[uint64]chan qmpMessage
	err     error         // why the connection ended
	ended   chan struct{} // closed with it
}

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *QMPError       `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

// DialQMP connects to QEMU's socket at path, reads the greeting and enters
// command mode. onEvent (may be nil) is called from the reading goroutine and
// must not call Execute.
func DialQMP(ctx context.Context, path string, onEvent func(Event)) (*QMP, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("machine: connect to QMP: %w", err)
	}
	q, err := newQMP(ctx, conn, onEvent)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return q, nil
}

func newQMP(ctx context.Context, conn net.Conn, onEvent func(Event)) (*QMP, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 64<<10)
	line, err := readMessage(r)
	if !stop() {
		err = ctx.Err() // a deadline in the past is how the wait was ended
	}
	if err != nil {
		return nil, fmt.Errorf("machine: read QMP greeting: %w", err)
	}
	var hello qmpMessage
	if err := json.Unmarshal(line, &hello); err != nil {
		return nil, fmt.Errorf("machine: read QMP greeting: %w", err)
	}
	if hello.Greeting == nil {
		return nil, errors.New("machine: read QMP greeting: this is not QMP")
	}
	q := &QMP{conn: conn, onEvent: onEvent, waiting: map[uint64]chan qmpMessage{}, ended: make(chan struct{})}
	go q.read(r)
	if _, err := q.Execute(ctx, "qmp_capabilities", nil); err != nil {
		return nil, err
	}
	return q, nil
}

// readMessage reads one line, not longer than maxMessage.
func readMessage(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxMessage {
			return nil, fmt.Errorf("message of more than %d bytes", maxMessage)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

func (q *QMP) read(r *bufio.Reader) {
	var err error
	for {
		var line []byte
		if line, err = readMessage(r); err != nil {
			break
		}
		var m qmpMessage
		if err = json.Unmarshal(line, &m); err != nil {
			break
		}
		switch {
		case m.Event != "":
			if q.onEvent != nil {
				q.onEvent(Event{Name: m.Event, Data: m.Data, At: time.Now()})
			}
		case m.ID != nil:
			q.mu.Lock()
			answer := q.waiting[*m.ID]
			delete(q.waiting, *m.ID)
			q.mu.Unlock()
			if answer != nil {
				answer <- m // has room for one, and each ID gets one
			}
		}
	}
	_ = q.conn.Close()
	q.mu.Lock()
	q.err = fmt.Errorf("machine: QMP connection ended: %w", err)
	q.mu.Unlock()
	close(q.ended)
}

// Execute runs a command and returns its result. args may be nil.
func (q *QMP) Execute(ctx context.Context, command string, args any) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	answer := make(chan qmpMessage, 1)
	q.mu.Lock()
	id := q.nextID
	q.nextID++
	q.waiting[id] = answer
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
	}()
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return nil, fmt.Errorf("machine: QMP %s: %w", command, err)
	}
	deadline, _ := ctx.Deadline()
	_ = q.conn.SetWriteDeadline(deadline)
	if _, err := q.conn.Write(append(b, '\n')); err != nil {
		return nil, fmt.Errorf("machine: QMP %s: %w", command, err)
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			m.Error.Command = command
			return nil, m.Error
		}
		return m.Return, nil
	case <-q.ended:
		q.mu.Lock()
		defer q.mu.Unlock()
		return nil, fmt.Errorf("machine: QMP %s: %w", command, q.err)
	case <-ctx.Done():
		return nil, fmt.Errorf("machine: QMP %s: %w", command, ctx.Err())
	}
}

// Close ends the connection and waits for its reader.
func (q *QMP) Close() error {
	err := q.conn.Close()
	<-q.ended
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("machine: close QMP: %w", err)
	}
	return nil
}
