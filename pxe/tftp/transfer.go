package tftp

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// transfer is one file on its way to one client, on a socket of its own that
// hears that client alone.
type transfer struct {
	s      *Server
	client netip.AddrPort
	conn   *net.UDPConn
	// waiting is its place among those that have not answered, nil when it
	// has left them. The server's lock guards it.
	waiting *list.Element
	// capped is the largest block this client is known to get, 0 for any.
	capped int

	block, window int
	file          io.Reader
	p             Progress
	reported      int64

	// ring holds the blocks sent and not yet acknowledged, first is the
	// number of the oldest; numbers are 64 bits here and 16 on the wire.
	ring  [][]byte
	first int64
	eof   bool

	rto    rto
	proven bool
	// moved is when the client was last heard, in nanoseconds.
	moved atomic.Int64
	// cancel ends it, with the reason.
	cancel context.CancelCauseFunc
	ctx    context.Context
}

// Retransmission, after RFC 6298: TFTP has no rules of its own, and one fixed
// timeout is either slow on a LAN or fills a thin line with duplicates.
const (
	// minRTO leaves firmware time to look at its network card: EDK2 polls it
	// every 10 ms, and draws on the screen in between.
	minRTO = 40 * time.Millisecond
	// maxRTO is above what a queue before a thin line holds.
	maxRTO = 8 * time.Second
	// shyFor is how long a client that has not taken one block is waited for,
	// quietFor one that has stopped in the middle.
	shyFor   = 6 * time.Second
	quietFor = 20 * time.Second
)

type rto struct {
	srtt, dev time.Duration
	cur       time.Duration
}

// measured takes in the time of one round trip.
func (r *rto) measured(d time.Duration) {
	if r.srtt == 0 {
		r.srtt, r.dev = d, d/2
	} else {
		r.dev += ((r.srtt - d).Abs() - r.dev) / 4
		r.srtt += (d - r.srtt) / 8
	}
	r.cur = min(max(r.srtt+4*r.dev, minRTO), maxRTO)
}

func (r *rto) lost() { r.cur = min(2*r.cur, maxRTO) }

var (
	errSilent  = errors.New("tftp: timeout: the client stopped answering")
	errLeft    = errors.New("tftp: timeout: the client has closed its port")
	errReplace = errors.New("tftp: the client began again")
	errPushed  = errors.New("tftp: timeout: given up in favour of others")
)

// run sends the file. answer is the OACK, nil if the client asked no option.
func (t *transfer) run(answer []byte) error {
	stop := context.AfterFunc(t.ctx, func() { _ = t.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	t.rto.cur = t.s.cfg.Timeout
	if answer != nil {
		if err := t.exchange([][]byte{answer}, -1); err != nil {
			return err
		}
	}
	// The answer to a small packet says little of how long a window takes on
	// a thin line.
	t.rto = rto{cur: min(t.s.cfg.Timeout*time.Duration(t.window), maxRTO)}
	t.first = 1
	for {
		if err := t.fill(); err != nil {
			return err
		}
		if len(t.ring) == 0 {
			return nil
		}
		if err := t.exchange(t.ring, t.first); err != nil {
			return err
		}
	}
}

// fill reads blocks until the window is full or the file has ended.
func (t *transfer) fill() error {
	for !t.eof && len(t.ring) < t.window {
		b := make([]byte, 4+t.block)
		n, err := io.ReadFull(t.file, b[4:])
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			t.send(errorPacket(codeUndefined, "file cannot be read"))
			return err
		}
		// A file that ends with a full block is followed by an empty one.
		t.eof = n < t.block
		binary.BigEndian.PutUint16(b, opData)
		binary.BigEndian.PutUint16(b[2:], uint16(t.first+int64(len(t.ring))))
		t.ring = append(t.ring, b[:4+n])
	}
	return nil
}

// exchange sends packets and waits until at least one of them is
// acknowledged; first is the block number of packets[0], -1 for the OACK,
// which block 0 acknowledges.
func (t *transfer) exchange(packets [][]byte, first int64) error {
	buf := t.s.pool.Get().(*[]byte)
	defer t.s.pool.Put(buf)
	began := time.Now()
	w := wait{first: first, n: len(packets)}
	for {
		w.sent = time.Now()
		for _, p := range packets {
			t.send(p)
		}
		k, err := t.await(&w, *buf)
		switch {
		case err == nil && k == 0:
			// The client misses the window's first block.
		case err == nil:
			if !w.resent {
				// Not of what was sent twice (Karn).
				t.rto.measured(time.Since(w.sent))
			}
			if err := t.prove(); err != nil || first < 0 {
				return err
			}
			t.count(packets[:k])
			t.ring = t.ring[k:]
			t.first += int64(k)
			return nil
		case errors.Is(err, errLeft) && t.eof && t.p.Sent > 0:
			// It has closed its port after the last block: its last word was
			// lost, not the file.
			t.count(packets)
			t.ring = nil
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case time.Since(began) > t.patience():
			t.send(errorPacket(codeUndefined, "timeout"))
			return errSilent
		default:
			t.rto.lost()
		}
		w.resent = true
	}
}

// wait is what an exchange waits for.
type wait struct {
	first int64
	n     int
	sent  time.Time
	// resent: it was sent more than once. nudged: the client has said that
	// it misses the first block.
	resent, nudged bool
}

// await reads until k of the packets are acknowledged. k is 0 if they must be
// sent again at once, and the error os.ErrDeadlineExceeded if that time has come.
func (t *transfer) await(w *wait, buf []byte) (k int, err error) {
	for {
		_ = t.conn.SetReadDeadline(w.sent.Add(t.rto.cur))
		// Looked at after the deadline is set, since the end sets one too.
		if t.ctx.Err() != nil {
			return 0, t.ended()
		}
		n, err := t.conn.Read(buf)
		switch {
		case errors.Is(err, unix.ECONNREFUSED):
			return 0, errLeft
		case err != nil && t.ctx.Err() != nil:
			return 0, t.ended()
		case err != nil:
			return 0, err
		}
		block, ack, gone := parseReply(buf[:n])
		switch {
		case gone != nil:
			gone.early = w.first <= 1
			return 0, gone
		case !ack:
		case w.first < 0:
			if block == 0 {
				return 1, nil
			}
		default:
			// The distance on the 16-bit circle. What is outside the window
			// is an old acknowledgement, and stays without effect: answering
			// it would double every block from here on (RFC 1123 section
			// 4.2.3.1).
			k := int(block - uint16(w.first) + 1)
			if k >= 1 && k <= w.n {
				return k, nil
			}
			if k == 0 && w.n > 1 && !w.nudged && t.rto.srtt > 0 && time.Since(w.sent) >= t.rto.srtt {
				// RFC 7440 section 4. Once per window, and not before an
				// answer to it can be here: what comes sooner is the echo of
				// a duplicate of ours.
				w.nudged = true
				return 0, nil
			}
		}
	}
}

func (t *transfer) patience() time.Duration {
	if t.p.Sent > 0 {
		return quietFor
	}
	return shyFor
}

// prove moves a transfer whose client has answered among the real ones: until
// then its address may be forged.
func (t *transfer) prove() error {
	t.moved.Store(time.Now().UnixNano())
	if t.proven {
		return nil
	}
	if !t.s.admit(t) {
		t.send(errorPacket(codeUndefined, errBusy.Error()))
		return errBusy
	}
	t.proven = true
	return nil
}

func (t *transfer) ended() error {
	err := context.Cause(t.ctx)
	if errors.Is(err, errStopping) {
		t.send(errorPacket(codeUndefined, errStopping.Error()))
	}
	return err
}

func (t *transfer) send(b []byte) {
	// What cannot be sent is lost, as on the wire: it is sent again.
	_, _ = t.conn.Write(b)
}

// count reports blocks that arrived: at the start and at every tenth part.
func (t *transfer) count(packets [][]byte) {
	first := t.p.Sent == 0
	for _, p := range packets {
		t.p.Sent += int64(len(p) - 4)
	}
	if first && t.p.Sent > 0 || t.p.Size > 0 && t.p.Sent-t.reported >= (t.p.Size+9)/10 && t.p.Sent < t.p.Size {
		t.reported = t.p.Sent
		t.s.report(t.p)
	}
}
