package kmod

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestMatchAlias(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"pci:v00001AF4d00001000sv*sd*bc*sc*i*", "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00", true},
		{"pci:v00001AF4d00001041sv*sd*bc*sc*i*", "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00", false},
		{"virtio:d00000001v*", "virtio:d00000001v00001AF4", true},
		{"virtio:d00000001v*", "virtio:d00000002v00001AF4", false},
		{"acpi*:MSFT0101:*", "acpi:MSFT0101:MSFT0101:", true},
		{"usb:v*p*d*dc*dsc*dp*ic08isc06ip50in*", "usb:v0781p5567d0100dc00dsc00dp00ic08isc06ip50in00", true},
		{"platform:reg-dummy", "platform:reg_dummy", true},
		{"a?c", "abc", true}, {"a?c", "ac", false},
		{"a[bx]c", "axc", true}, {"a[bx]c", "ayc", false},
		{"a[0-9A-F]c", "a7c", true}, {"a[0-9A-F]c", "agc", false},
		{"a[!b]c", "axc", true}, {"a[!b]c", "abc", false},
		{"a[b", "ab", false}, {"", "", true}, {"", "a", false}, {"*", "", true}, {"**a", "bba", true},
		{strings.Repeat("*a", 60), strings.Repeat("a", 59), false},
	} {
		if got := matchAlias(c.pattern, c.s); got != c.want {
			t.Errorf("%q on %q: %v", c.pattern, c.s, got)
		}
	}
}

// TestMatchAliasAgreesWithPathMatch compares with the standard library where
// both speak the same language (no brackets, no '/', no dashes).
func TestMatchAliasAgreesWithPathMatch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringOfN(rapid.SampledFrom([]rune("ab:*?")), 0, 12, -1).Draw(t, "pattern")
		s := rapid.StringOfN(rapid.SampledFrom([]rune("ab:")), 0, 12, -1).Draw(t, "s")
		want, err := filepath.Match(pattern, s)
		if err != nil {
			t.Skip()
		}
		if got := matchAlias(pattern, s); got != want {
			t.Fatalf("%q on %q: %v, path.Match says %v", pattern, s, got, want)
		}
	})
}

const (
	testDep = `kernel/drivers/net/virtio_net.ko: kernel/net/core/failover.ko kernel/drivers/virtio/virtio.ko
kernel/net/core/failover.ko:
kernel/drivers/virtio/virtio.ko:
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
kernel/sound/snd-x.ko: ../../../etc/passwd.ko /abs.ko
../escape.ko:
no colon here
`
	testAlias = `# Aliases extracted from modules themselves.
alias virtio:d00000001v* virtio_net
alias fs-ext4 ext4
alias symbol:x
alias pci:v*d*sv*sd*bc04sc03i* snd_x
`
)

func TestModuleIndex(t *testing.T) {
	x, err := parseModules([]byte(testDep), []byte(testAlias))
	if err != nil {
		t.Fatal(err)
	}
	if got := x.lookup("virtio:d00000001v00001AF4"); !slices.Equal(got, []string{"virtio_net"}) {
		t.Errorf("lookup: %v", got)
	}
	if got := x.lookup("virtio:d00000009v0"); got != nil {
		t.Errorf("lookup of a stranger: %v", got)
	}
	files, err := x.closure("virtio-net")
	if err != nil || len(files) != 3 || files[2] != "kernel/drivers/net/virtio_net.ko" {
		t.Errorf("closure %v, %v", files, err)
	}
	if files, err := x.closure("a"); err != nil || len(files) != 2 || files[1] != "kernel/a.ko" {
		t.Errorf("closure of a cycle: %v, %v", files, err)
	}
	if files, err := x.closure("snd_x"); err != nil || len(files) != 1 {
		t.Errorf("closure with paths outside: %v, %v", files, err)
	}
	if _, err := x.closure("escape"); err == nil {
		t.Error("a module outside the tree was found")
	}
	if _, err := x.closure("none"); err == nil {
		t.Error("a module that is not there was found")
	}
}

func TestLoaderLoadsEachModuleOnceAndStopsAtErrors(t *testing.T) {
	x, err := parseModules([]byte(testDep), []byte(testAlias))
	if err != nil {
		t.Fatal(err)
	}
	var inserted []string
	fails := map[string]error{}
	l := &Loader{dir: "/m", index: x, log: slog.New(slog.DiscardHandler), done: map[string]error{}, insert: func(f string) error {
		inserted = append(inserted, filepath.Base(f))
		return fails[filepath.Base(f)]
	}}
	dir := t.TempDir()
	for _, dev := range []string{"pci0/virtio0", "pci0/virtio1"} {
		if err := os.MkdirAll(filepath.Join(dir, dev), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, dev, "modalias"), []byte("virtio:d00000001v00001AF4\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l.Coldplug(context.Background(), dir)
	if want := []string{"failover.ko", "virtio.ko", "virtio_net.ko"}; !slices.Equal(inserted, want) || l.Count() != 3 {
		t.Errorf("inserted %v, want %v", inserted, want)
	}
	inserted, fails["b.ko"] = nil, unix.EPERM
	if err := l.Module("a"); !errors.Is(err, unix.EPERM) || !slices.Equal(inserted, []string{"b.ko"}) {
		t.Errorf("after a refusal: %v, inserted %v", err, inserted)
	}
	if err := l.Module("a"); !errors.Is(err, unix.EPERM) || len(inserted) != 1 {
		t.Errorf("a refused module was tried again: %v, %v", err, inserted)
	}
}

func TestParseUevent(t *testing.T) {
	e, ok := parseUevent([]byte("add@/devices/pci0\x00ACTION=add\x00SUBSYSTEM=pci\x00MODALIAS=pci:v1\x00DEVNAME=x\x00junk\x00"))
	if want := (Event{"add", "pci", "pci:v1", "x"}); !ok || e != want {
		t.Errorf("got %+v, %v", e, ok)
	}
	for _, bad := range []string{"", "libudev\x00ACTION=add\x00", "add@/x\x00SUBSYSTEM=pci\x00"} {
		if _, ok := parseUevent([]byte(bad)); ok {
			t.Errorf("%q was taken for an event", bad)
		}
	}
}

func FuzzMatchAlias(f *testing.F) {
	f.Add("pci:v*d[0-9]?", "pci:v1d2x")
	f.Add("[", "a")
	f.Add("[]", "]")
	f.Add("a[!", "ab")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > maxAlias || len(s) > maxAlias {
			return
		}
		matchAlias(pattern, s)
		if !strings.ContainsAny(s, "*?[]") && !matchAlias(s, s) {
			t.Fatalf("%q does not match itself", s)
		}
	})
}

func FuzzModules(f *testing.F) {
	f.Add([]byte(testDep), []byte(testAlias))
	f.Add([]byte(":\n:::"), []byte("alias a"))
	f.Fuzz(func(t *testing.T, dep, alias []byte) {
		x, err := parseModules(dep, alias)
		if err != nil {
			return
		}
		for name := range x.paths {
			files, err := x.closure(name)
			if err != nil {
				continue
			}
			for _, file := range files {
				if filepath.IsAbs(file) || strings.HasPrefix(filepath.Clean(file), "..") {
					t.Fatalf("module outside the tree: %q", file)
				}
			}
		}
		x.lookup("pci:v1")
	})
}

func FuzzUevent(f *testing.F) {
	f.Add([]byte("add@/x\x00ACTION=add\x00MODALIAS=a\x00"))
	f.Fuzz(func(t *testing.T, b []byte) { parseUevent(b) })
}
