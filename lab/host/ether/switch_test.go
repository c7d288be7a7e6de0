package ether

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// station is a machine at a port: what it sends and what it got.
type station struct {
	mac byte
	to  chan []byte // to the switch
	got chan string
	end chan struct{}
}

func (s *station) Read(b []byte) (int, error) {
	select {
	case f := <-s.to:
		return copy(b, f), nil
	case <-s.end:
		return 0, io.EOF
	}
}

func (s *station) Write(b []byte) (int, error) {
	select {
	case s.got <- string(b[14:]):
		return len(b), nil
	case <-s.end:
		return 0, io.ErrClosedPipe
	}
}

func (s *station) Close() error { close(s.end); return nil }

func frame(from, to byte, text string) []byte {
	f := append([]byte{2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5}, text...)
	switch to {
	case 0xff:
		copy(f, []byte{255, 255, 255, 255, 255, 255})
	case 0xfb:
		copy(f, []byte{1, 0, 0x5e, 0, 0, 0xfb})
	}
	return f
}

// lan is a switch with stations a, b, c with addresses 1, 2, 3.
type lan struct {
	*Switch
	t  *testing.T
	at map[string]*station
}

func newLAN(t *testing.T, cfg Config, names ...string) *lan {
	l := &lan{New(cfg), t, map[string]*station{}}
	for i, n := range names {
		l.plug(n, byte(i+1))
	}
	return l
}

func (l *lan) plug(name string, mac byte) {
	l.at[name] = &station{mac: mac, to: make(chan []byte), got: make(chan string, 100_000), end: make(chan struct{})}
	if err := l.Attach(name, l.at[name]); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lan) send(from string, to byte, text string) {
	l.at[from].to <- frame(l.at[from].mac, to, text)
	synctest.Wait()
}

// heard returns what a station has got until now.
func (l *lan) heard(name string) []string {
	synctest.Wait()
	var out []string
	for {
		select {
		case s := <-l.at[name].got:
			out = append(out, s)
		default:
			return out
		}
	}
}

func (l *lan) want(name string, texts ...string) {
	l.t.Helper()
	if got := l.heard(name); !slices.Equal(got, texts) {
		l.t.Errorf("%s heard %q, want %q", name, got, texts)
	}
}

func (l *lan) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func in(t *testing.T, cfg Config, f func(*lan)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := newLAN(t, cfg, "a", "b", "c")
		f(l)
		l.must(l.Close())
	})
}

func TestForward(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.send("a", 2, "unknown goes everywhere")
		l.want("b", "unknown goes everywhere")
		l.want("c", "unknown goes everywhere")
		l.want("a")
		l.send("b", 1, "learned goes to one")
		l.want("a", "learned goes to one")
		l.want("c")
		l.send("a", 0xff, "broadcast")
		l.want("b", "broadcast")
		l.want("c", "broadcast")
		// b's address moves to c's port: the newest place counts.
		l.at["c"].to <- frame(2, 0xff, "I am b")
		l.want("b", "I am b")
		l.send("a", 2, "where are you")
		l.want("b")
		l.want("c", "where are you")
		c := l.Counters()
		if c["a"].In != 3 || c["b"].Out != 3 || c["a"].InGroupBytes == 0 || c["c"].Queue != 0 {
			t.Errorf("counters %+v", c)
		}
	})
}

func TestFramesThatAreNone(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		for _, f := range [][]byte{nil, {1}, make([]byte, 13), frame(1, 0xff, string(make([]byte, MaxFrame-13)))} {
			l.at["a"].to <- f
		}
		l.want("b")
		l.at["a"].to <- frame(1, 0xff, string(make([]byte, MaxFrame-14)))
		if got := l.heard("b"); len(got) != 1 || l.Counters()["a"].Size != 1 {
			t.Errorf("got %d frames, counters %+v", len(got), l.Counters()["a"])
		}
	})
}

func TestPartition(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.Partition([]string{"a"}, []string{"b"})
		l.send("a", 0xff, "1")
		l.want("b")
		l.want("c", "1")
		l.send("c", 0xff, "2")
		l.want("a", "2")
		l.want("b", "2")
		if n := l.Counters()["b"].Partition; n != 1 {
			t.Errorf("%d frames counted", n)
		}
		l.Partition()
		l.send("a", 0xff, "3")
		l.want("b", "3")
	})
}

func TestOneWay(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetWay("a", "b", Faults{Cut: true}))
		l.send("a", 0xff, "there")
		l.want("b")
		l.want("c", "there")
		l.send("b", 0xff, "back")
		l.want("a", "back")
		l.Heal()
		l.send("a", 0xff, "again")
		l.want("b", "again")
	})
}

func TestMulticastFiltered(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetPort("b", Faults{NoMulticast: true}))
		l.send("a", 0xfb, "mdns")
		l.want("b")
		l.want("c", "mdns")
		l.send("b", 0xfb, "mdns of b")
		l.want("a")
		l.send("a", 0xff, "arp")
		l.want("b", "arp")
		l.heard("c")
		l.send("b", 1, "unicast")
		l.want("a", "unicast")
	})
}

func TestDark(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetPort("b", Faults{Delay: time.Second}))
		l.send("a", 0xff, "under way")
		l.must(l.Dark("b", 10*time.Second))
		l.send("a", 0xff, "in the dark")
		l.send("b", 0xff, "from the dark")
		time.Sleep(9 * time.Second)
		l.want("b")
		l.want("a")
		time.Sleep(2 * time.Second)
		l.send("a", 0xff, "light")
		time.Sleep(time.Second)
		l.want("b", "light")
		l.must(l.Dark("b", 0))
		l.send("b", 0xff, "dark again")
		time.Sleep(time.Hour)
		l.want("a")
		l.Light("b")
		l.send("b", 0xff, "light again")
		time.Sleep(time.Second)
		l.want("a", "light again")
	})
}

func TestDelay(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetWay("a", "b", Faults{Delay: time.Second, Jitter: 500 * time.Millisecond}))
		for i := range 20 {
			l.send("a", 0xff, fmt.Sprintf("%02d", i))
		}
		time.Sleep(999 * time.Millisecond)
		l.want("b")
		if n := len(l.heard("c")); n != 20 {
			t.Errorf("c heard %d at once, want 20", n)
		}
		time.Sleep(2 * time.Millisecond)
		if n := len(l.heard("b")); n > 1 {
			t.Errorf("%d of 20 at the very beginning of the jitter", n)
		}
		time.Sleep(500 * time.Millisecond)
		if late := l.heard("b"); len(late) < 19 || !slices.IsSorted(late) {
			t.Errorf("late ones: %q", late)
		}
		// A slow way holds nobody else's frames up.
		l.must(l.SetWay("c", "b", Faults{Delay: time.Minute}))
		l.send("c", 0xff, "slow")
		l.send("a", 0xff, "fast")
		time.Sleep(2 * time.Second)
		l.want("b", "fast")
	})
}

func TestBandwidth(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetPort("b", Faults{Bandwidth: 8 * 1000})) // 1,000 bytes a second
		for range 5 {
			l.send("a", 0xff, string(make([]byte, 986))) // 1,000 with the header
		}
		for i := range 5 {
			time.Sleep(time.Second)
			if n := len(l.heard("b")); n != 1 {
				t.Errorf("second %d: %d frames", i+1, n)
			}
		}
		// The cable of the other one is as fast as ever.
		if n := len(l.heard("c")); n != 5 {
			t.Errorf("c heard %d", n)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	in(t, Config{Queue: 10}, func(l *lan) {
		l.must(l.SetPort("b", Faults{Delay: time.Second}))
		for range 25 {
			l.send("a", 0xff, "x")
		}
		time.Sleep(2 * time.Second)
		if n := len(l.heard("b")); n != 10 || l.Counters()["b"].Queue != 15 {
			t.Errorf("%d arrived, counters %+v", n, l.Counters()["b"])
		}
	})
}

// fates plays 1,000 frames from a to b, with noise between a and c, and
// returns what b heard.
func fates(t *testing.T, seed uint64, noise int, f Faults) (got []string) {
	in(t, Config{Seed: seed}, func(l *lan) {
		l.must(l.SetWay("a", "b", f))
		l.must(l.SetWay("c", "a", f))
		for i := range 1000 {
			for range noise {
				l.send("c", 1, "noise")
			}
			l.at["a"].to <- frame(1, 2, fmt.Sprintf("%04d", i))
		}
		time.Sleep(time.Minute)
		for _, s := range l.heard("b") {
			if s != "noise" {
				got = append(got, s)
			}
		}
	})
	return got
}

func TestDiceBySeed(t *testing.T) {
	f := Faults{Loss: 0.3, Duplicate: 0.1, Reorder: 0.1, Jitter: time.Millisecond}
	first := fates(t, 7, 0, f)
	if other := fates(t, 7, 0, f); !slices.Equal(first, other) {
		t.Error("the same seed gave another result")
	}
	if other := fates(t, 7, 2, f); !slices.Equal(first, other) {
		t.Error("noise on another pair changed what befell this one")
	}
	if other := fates(t, 8, 0, f); slices.Equal(first, other) {
		t.Error("another seed gave the same result")
	}
}

func TestRates(t *testing.T) {
	if got := fates(t, 1, 0, Faults{}); len(got) != 1000 || !slices.IsSorted(got) {
		t.Errorf("a good cable delivered %d of 1,000", len(got))
	}
	// Binomial with n=1,000, p=0.3: six standard deviations are 87. The seed
	// is fixed, so this passes always or never.
	if n := len(fates(t, 1, 0, Faults{Loss: 0.3})); n < 613 || n > 787 {
		t.Errorf("30 %% loss left %d of 1,000", n)
	}
	if n := len(fates(t, 1, 0, Faults{Duplicate: 0.3})); n < 1213 || n > 1387 {
		t.Errorf("30 %% duplication made %d of 1,000", n)
	}
	if n := len(fates(t, 1, 0, Faults{Loss: 1})); n != 0 {
		t.Errorf("full loss left %d", n)
	}
	got := fates(t, 1, 0, Faults{Reorder: 0.1})
	if len(got) != 1000 || slices.IsSorted(got) {
		t.Errorf("reordering: %d of 1,000, in order: %v", len(got), slices.IsSorted(got))
	}
}

func TestPlugs(t *testing.T) {
	in(t, Config{}, func(l *lan) {
		l.must(l.SetPort("d", Faults{Cut: true})) // before it is there
		l.plug("d", 4)
		if err := l.Attach("d", &station{}); err == nil {
			t.Error("two stations at one port")
		}
		l.send("a", 0xff, "1")
		l.want("d")
		l.must(l.Detach("d"))
		l.must(l.Detach("d"))
		l.must(l.Detach("nobody"))
		l.send("a", 0xff, "2")
		l.plug("d", 4)
		l.send("a", 0xff, "3")
		l.want("d") // the cable is as bad as before
		l.must(l.SetPort("d", Faults{}))
		l.send("a", 0xff, "4")
		l.want("d", "4")
		if c := l.Counters()["d"]; c.Cut != 2 || c.Out != 1 {
			t.Errorf("counters of d: %+v", c)
		}
	})
}

func TestFaultsAreChecked(t *testing.T) {
	s := New(Config{})
	for _, f := range []Faults{{Loss: -0.1}, {Loss: 1.1}, {Duplicate: 2}, {Reorder: -1}, {Delay: -1}, {Jitter: time.Hour}, {Bandwidth: -1}} {
		if s.SetPort("a", f) == nil || s.SetWay("a", "b", f) == nil {
			t.Errorf("%+v was taken", f)
		}
	}
	if err := s.SetPort("a", Faults{Loss: 1, Duplicate: 0.5}); err != nil {
		t.Error(err)
	}
}

func TestCapture(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.pcap")
	in(t, Config{}, func(l *lan) {
		f, err := os.Create(path)
		l.must(err)
		l.send("a", 0xff, "before")
		l.must(l.Capture("b", f))
		l.must(l.SetWay("a", "b", Faults{Loss: 1}))
		l.send("a", 0xff, "lost")
		l.must(l.SetWay("a", "b", Faults{}))
		l.send("a", 0xff, "seen")
		l.send("b", 0xff, "sent")
		l.must(l.Capture("b", nil))
		l.send("a", 0xff, "after")
	})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) < 24 || binary.LittleEndian.Uint32(b) != 0xa1b2c3d4 {
		t.Fatalf("this is no capture: %x", b)
	}
	for text, want := range map[string]bool{"seen": true, "sent": true, "lost": false, "before": false, "after": false} {
		if bytes.Contains(b, []byte(text)) != want {
			t.Errorf("capture has %q: %v", text, !want)
		}
	}
}
