package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

type events []pxe.Event

func (e *events) Event(x pxe.Event) { *e = append(*e, x) }

// bare is a server without sockets, on virtual time.
func bare(t *testing.T, dir string, now *time.Time) (*Server, *events) {
	t.Helper()
	ev := &events{}
	return &Server{cfg: Config{Mode: pxe.ModeFull, Images: Dir(dir), Events: ev, Now: func() time.Time { return *now },
		Policy: PolicyFunc(func(context.Context, pxe.Machine) Decision { return Decision{} })},
		log: quiet(), machines: newMachines("", quiet()), server: netip.MustParseAddr("10.77.0.1")}, ev
}

func TestDir(t *testing.T) {
	outside := t.TempDir()
	for _, f := range []string{"secret", ImageName} {
		if err := os.WriteFile(filepath.Join(outside, f), []byte("outside"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	read := func(cpu, name string) (string, error) {
		f, err := Dir(dir).Open(cpu, name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		return string(b), err
	}
	if _, err := read("amd64", ImageName); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("empty folder: %v", err)
	}
	put(ImageName, "top")
	put("site.json", "not for the network")
	if s, err := read("amd64", ImageName); s != "top" {
		t.Errorf("amd64 reads %q, %v", s, err)
	}
	if _, err := read("arm64", ImageName); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("arm64 gets amd64's image: %v", err)
	}
	put("amd64/"+ImageName, "amd64")
	put("arm64/"+ImageName, "arm64")
	for _, cpu := range cpus {
		if s, err := read(cpu, ImageName); s != cpu {
			t.Errorf("%s reads %q, %v", cpu, s, err)
		}
	}
	for _, c := range [][2]string{{"amd64", "site.json"}, {"amd64", "../site.json"}, {"..", ImageName}, {"", ImageName}, {"riscv64", ImageName}} {
		if s, err := read(c[0], c[1]); err == nil {
			t.Errorf("%v reads %q", c, s)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "arm64", ImageName)), os.Symlink(filepath.Join(outside, ImageName), filepath.Join(dir, "arm64", ImageName))); err != nil {
		t.Fatal(err)
	}
	if s, err := read("arm64", ImageName); err == nil {
		t.Errorf("a link leads outside: %q", s)
	}
	if _, err := Dir(filepath.Join(dir, "nosuch")).Open("amd64", ImageName); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

func TestNamesFromTheNetwork(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ImageName), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1, 0)
	s, _ := bare(t, dir, &now)
	for n, ok := range map[string]bool{"amd64/recovery.efi": true, "recovery.efi": true, "arm64/recovery.efi": false, "amd64/recovery.efi/x": false,
		"x/amd64/recovery.efi": false, "amd64": false, "manifest.dsse.json": false, "": false, "/recovery.efi": false} {
		f, err := s.openName(n)
		if (err == nil) != ok {
			t.Errorf("%q: %v", n, err)
		}
		if err == nil {
			f.Close()
		}
	}
}

func TestMachineTableIsBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	s, _ := bare(t, t.TempDir(), &now)
	keep := pxe.MAC{2, 0xff}
	s.step(keep, netip.MustParseAddr("10.77.0.9"), pxe.StateOffered, false, "offered")
	for i := range 2 * maxMachines {
		now = now.Add(time.Second)
		s.Decide(t.Context(), now, pxe.Request{Port: 67, Type: pxe.Discover, MAC: pxe.MAC{2, 0, byte(i >> 16), byte(i >> 8), byte(i), 1}, Archs: []pxe.Arch{0}, VendorClass: "PXEClient"}, "")
	}
	if n := len(s.machines.byMAC); n > maxMachines {
		t.Errorf("%d machines are remembered", n)
	}
	if s.machines.byMAC[keep] == nil {
		t.Error("a flood of strangers pushed a booting machine out")
	}
}

func TestSameWordsAreNotRepeated(t *testing.T) {
	now := time.Unix(1000, 0)
	s, ev := bare(t, t.TempDir(), &now)
	mac := pxe.MAC{2}
	say := func(st pxe.State, text string) { s.step(mac, netip.Addr{}, st, false, text) }
	for range 5 {
		say(pxe.StateRefused, "a")
	}
	say(pxe.StateRefused, "b")
	say(pxe.StateOffered, "b")
	now = now.Add(2 * time.Minute)
	say(pxe.StateOffered, "b")
	if len(*ev) != 4 {
		t.Errorf("%d events: %v", len(*ev), *ev)
	}
	s.CalledHome(mac)
	if last := (*ev)[len(*ev)-1]; last.Step != pxe.StateCalledHome {
		t.Errorf("last event: %s", last)
	}
	if m := s.Machines(); len(m) != 1 || m[0].State != pxe.StateCalledHome {
		t.Errorf("%+v", m)
	}
}

func TestFloodOfRefusalsIsToldInOneLine(t *testing.T) {
	now := time.Unix(1000, 0)
	s, ev := bare(t, t.TempDir(), &now)
	refuse := func(i int) {
		s.step(pxe.MAC{2, 0, 0, byte(i >> 16), byte(i >> 8), byte(i)}, netip.Addr{}, pxe.StateRefused, false, "no")
	}
	for i := range 1000 {
		refuse(i)
	}
	if len(*ev) != refusalBurst {
		t.Errorf("%d lines", len(*ev))
	}
	now = now.Add(5 * time.Second)
	refuse(1001)
	if last := (*ev)[len(*ev)-1].Text; last != "no (and 940 more machines refused, not shown)" {
		t.Errorf("last line: %s", last)
	}
	refuse(1002)
	if last := (*ev)[len(*ev)-1].Text; last != "no" {
		t.Errorf("last line: %s", last)
	}
	if n := len(*ev); n != refusalBurst+2 {
		t.Errorf("%d lines", n)
	}
}

// A station that fetches a byte again and again, or from ever new addresses,
// does not push everything else out of the event log.
func TestFloodOfTransfersIsToldInFewLines(t *testing.T) {
	now := time.Unix(1000, 0)
	s, ev := bare(t, t.TempDir(), &now)
	one := func(client netip.Addr) {
		s.fetched(fetch{client: client, by: "http", name: "amd64/recovery.efi", sent: 30_000_000, size: 30_000_000, done: true})
	}
	known := netip.MustParseAddr("10.77.0.100")
	s.step(pxe.MAC{2, 7}, known, pxe.StateBound, false, "bound")
	for i := range 5000 {
		now = now.Add(time.Duration(i%2) * time.Microsecond)
		one(known)
	}
	if len(*ev) != lineBurst {
		t.Errorf("%d lines about one machine", len(*ev))
	}
	s.step(pxe.MAC{2, 7}, known, pxe.StateBound, true, "something is wrong with it")
	if last := (*ev)[len(*ev)-1]; !last.Alarm {
		t.Error("an alarm about it was kept back")
	}
	now = now.Add(lineEvery)
	one(known)
	if last := (*ev)[len(*ev)-1].Text; !strings.Contains(last, "more lines about it, not shown") {
		t.Errorf("last line: %s", last)
	}
	s.step(pxe.MAC{2, 8}, netip.Addr{}, pxe.StateBound, false, "bound")
	if last := (*ev)[len(*ev)-1]; last.MAC != (pxe.MAC{2, 8}) {
		t.Error("another machine was not told of")
	}
	for i := range 2 * allBurst {
		one(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}))
	}
	if n := len(*ev); n > allBurst+lineBurst {
		t.Errorf("%d lines about all", n)
	}
}

func TestTransferEvents(t *testing.T) {
	now := time.Unix(1000, 0)
	s, ev := bare(t, t.TempDir(), &now)
	mac, at := pxe.MAC{2, 7}, netip.MustParseAddr("10.77.0.100")
	s.step(mac, at, pxe.StateBound, false, "bound")
	*ev = nil
	at2 := func(f fetch) {
		f.client, f.by, f.name, f.size = at, "tftp", "amd64/recovery.efi", 30_000_000
		s.fetched(f)
	}
	at2(fetch{probe: true})
	at2(fetch{sent: 1})
	at2(fetch{sent: 15_000_000})
	at2(fetch{sent: 16_000_000, err: errors.New("sending block 9: code=3, error: \x1b[31mowned")})
	at2(fetch{sent: 1})
	now = now.Add(2500 * time.Millisecond)
	at2(fetch{sent: 30_000_000, done: true})
	s.fetched(fetch{client: netip.MustParseAddr("192.0.2.9"), by: "http", name: "x", done: true})
	var got []string
	for _, e := range *ev {
		got = append(got, e.Step.String()+": "+e.Text)
	}
	want := []string{
		"fetching: fetching amd64/recovery.efi (30.0 MB) by tftp",
		"seen: amd64/recovery.efi by tftp broke off after 16.0 MB of 30.0 MB: the client gave up",
		"fetching: fetching amd64/recovery.efi (30.0 MB) by tftp",
		"served: amd64/recovery.efi (30.0 MB) sent by tftp in 2.5 s",
		"served: x sent by http",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLearntFile(t *testing.T) {
	dir := t.TempDir()
	m := newMachines(dir, quiet())
	m.get(time.Unix(1, 0), pxe.MAC{2, 1}).ladder = pxe.Ladder{Start: pxe.RungBINL, Worked: true}
	m.get(time.Unix(1, 0), pxe.MAC{2, 2}).ladder = pxe.Ladder{Start: pxe.RungDirect, Worked: true}
	m.save()
	if _, err := os.Stat(m.path); err == nil {
		t.Error("written though nothing was learnt")
	}
	m.dirty = true
	m.save()
	again := newMachines(dir, quiet())
	if len(again.byMAC) != 1 || again.byMAC[pxe.MAC{2, 1}].ladder.Start != pxe.RungBINL {
		t.Errorf("%v came back", again.byMAC)
	}
	for _, bad := range []string{"", "{", `{"format":"x","rungs":{"02:01:00:00:00:00":1}}`, `{"format":"muster/boot-firmware/v1","rungs":{"zz":1}}`} {
		if err := os.WriteFile(m.path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if n := newMachines(dir, quiet()); len(n.byMAC) != 0 {
			t.Errorf("%q is believed", bad)
		}
	}
}

func TestSinks(t *testing.T) {
	var line, log bytes.Buffer
	sink := Sinks{NewLineSink(&line), LogSink{slog.New(slog.NewTextHandler(&log, nil))}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	sink.Event(pxe.Event{Time: at, MAC: pxe.MAC{2, 0, 0, 0, 0, 1}, Arch: 7, Addr: netip.MustParseAddr("10.77.0.100"), Step: pxe.StateBound, Text: "has taken the offer"})
	sink.Event(pxe.Event{Time: at, Alarm: true, Text: "another DHCP server"})
	want := "03:04:05  02:00:00:00:00:01 bound       has taken the offer (10.77.0.100)\n03:04:05  -                 ALARM       another DHCP server\n"
	if line.String() != want {
		t.Errorf("lines:\n%s\nwant:\n%s", line.String(), want)
	}
	for _, want := range []string{"level=INFO", "mac=02:00:00:00:00:01", "step=bound", "address=10.77.0.100", "level=WARN"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, log.String())
		}
	}
}
