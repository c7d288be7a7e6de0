package disktest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
)

// Unit is what a disk writes in one piece.
const Unit = 512

// Write is a unit that changed, or a flush.
type Write struct {
	Off   int64
	Data  []byte
	Flush bool
	// Point is what was being done, as Disk.Point said.
	Point string
}

// Disk is one in memory.
type Disk struct {
	size, sector int64
	units        map[int64][]byte
	// Log has the writes since Record.
	Log    []Write
	record bool
	point  string
	// Fail makes every write fail from now on: the power is gone.
	Fail error
}

// New returns an empty disk.
func New(size, sector int64) *Disk {
	return &Disk{size: size, sector: sector, units: map[int64][]byte{}}
}

// Clone returns a copy; units are shared, and never changed in place.
func (d *Disk) Clone() *Disk {
	c := New(d.size, d.sector)
	for k, v := range d.units {
		c.units[k] = v
	}
	return c
}

// Record begins a new log.
func (d *Disk) Record() { d.record, d.Log = true, nil }

// Point names what is done from here on.
func (d *Disk) Point(name string) { d.point = name }

// Apply does w.
func (d *Disk) Apply(w Write) {
	if !w.Flush {
		d.units[w.Off] = w.Data
	}
}

// Cut returns the disk as a power cut after the first n entries of log would
// leave it: base with everything up to the last flush before, and of what
// came after it a choice; rng nil: all of it.
func Cut(base *Disk, log []Write, n int, rng *rand.Rand) *Disk {
	out := base.Clone()
	flushed := 0
	for i := range n {
		if log[i].Flush {
			flushed = i + 1
		}
	}
	for i, w := range log[:n] {
		if i < flushed || rng == nil || rng.IntN(2) == 0 {
			out.Apply(w)
		}
	}
	return out
}

// ReadAt implements disk.Device.
func (d *Disk) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > d.size {
		return 0, fmt.Errorf("disktest: read %d bytes at %d of %d", len(b), off, d.size)
	}
	clear(b)
	for n := 0; n < len(b); {
		at := off + int64(n)
		u := at / Unit * Unit
		m := min(len(b)-n, int(u+Unit-at))
		if p, ok := d.units[u]; ok {
			copy(b[n:n+m], p[at-u:])
		}
		n += m
	}
	return len(b), nil
}

// Reread implements disk.Device.
func (d *Disk) Reread(b []byte, off int64) (int, error) { return d.ReadAt(b, off) }

var zeros = make([]byte, Unit)

// WriteAt implements disk.Device.
func (d *Disk) WriteAt(b []byte, off int64) (int, error) {
	if d.Fail != nil {
		return 0, d.Fail
	}
	if off < 0 || off+int64(len(b)) > d.size {
		return 0, fmt.Errorf("disktest: write %d bytes at %d of %d", len(b), off, d.size)
	}
	for n := 0; n < len(b); {
		at := off + int64(n)
		u := at / Unit * Unit
		m := min(len(b)-n, int(u+Unit-at))
		old, ok := d.units[u]
		if !ok {
			old = zeros
		}
		if !bytes.Equal(old[at-u:at-u+int64(m)], b[n:n+m]) {
			p := bytes.Clone(old)
			copy(p[at-u:], b[n:n+m])
			d.units[u] = p
			if d.record {
				d.Log = append(d.Log, Write{Off: u, Data: p, Point: d.point})
			}
		}
		n += m
	}
	return len(b), nil
}

// Sync implements disk.Device.
func (d *Disk) Sync() error {
	if d.Fail != nil {
		return d.Fail
	}
	if d.record && len(d.Log) > 0 && !d.Log[len(d.Log)-1].Flush {
		d.Log = append(d.Log, Write{Flush: true, Point: d.point})
	}
	return nil
}

// Size implements disk.Device.
func (d *Disk) Size() int64 { return d.size }

// Sector implements disk.Device.
func (d *Disk) Sector() int64 { return d.sector }

// Close is for those who open and close it.
func (d *Disk) Close() error { return nil }

// Equal reports whether both disks hold the same.
func (d *Disk) Equal(o *Disk) bool {
	at := func(x *Disk, u int64) []byte {
		if p, ok := x.units[u]; ok {
			return p
		}
		return zeros
	}
	for _, x := range []*Disk{d, o} {
		for u := range x.units {
			if !bytes.Equal(at(d, u), at(o, u)) {
				return false
			}
		}
	}
	return true
}
