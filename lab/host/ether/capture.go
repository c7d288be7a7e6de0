package ether

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// maxCapture bounds one capture; what comes later is left out.
const maxCapture = 512 << 20

// capture writes what passes a port's end of the cable, in libpcap's format.
type capture struct {
	w    io.WriteCloser
	size int64
	err  error
}

// Capture writes every frame that the port's station sends or gets to w until
// the next call, in libpcap's format; then w is closed. A nil w ends it. An
// error of the writer so far is returned then.
func (s *Switch) Capture(name string, w io.WriteCloser) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(name)
	if err != nil {
		return err
	}
	if old := p.capture; old != nil {
		p.capture = nil
		if cerr := old.w.Close(); old.err == nil {
			old.err = cerr
		}
		if old.err != nil {
			return fmt.Errorf("ether: capture %s: %w", name, old.err)
		}
	}
	if w == nil {
		return nil
	}
	c := &capture{w: w}
	head := make([]byte, 24) // pcap-savefile(5), microseconds, LINKTYPE_ETHERNET
	binary.LittleEndian.PutUint32(head, 0xa1b2c3d4)
	binary.LittleEndian.PutUint16(head[4:], 2)
	binary.LittleEndian.PutUint16(head[6:], 4)
	binary.LittleEndian.PutUint32(head[16:], 64<<10)
	binary.LittleEndian.PutUint32(head[20:], 1)
	c.write(head)
	p.capture = c
	return nil
}

func (c *capture) add(at time.Time, frame []byte) {
	if c == nil || c.size > maxCapture {
		return
	}
	rec := make([]byte, 16+len(frame))
	binary.LittleEndian.PutUint32(rec, uint32(at.Unix()))
	binary.LittleEndian.PutUint32(rec[4:], uint32(at.Nanosecond()/1000))
	binary.LittleEndian.PutUint32(rec[8:], uint32(len(frame)))
	binary.LittleEndian.PutUint32(rec[12:], uint32(len(frame)))
	copy(rec[16:], frame)
	c.write(rec)
}

func (c *capture) write(b []byte) {
	if c.err != nil {
		return
	}
	_, c.err = c.w.Write(b)
	c.size += int64(len(b))
}
