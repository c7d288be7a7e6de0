package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab/host/ether"
	"github.com/muster-edge/muster/pki/ekcert"

	"github.com/muster-edge/muster/pki"
)

// The test binary is the nodes' first process, too.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == InsideArgs[0] && os.Args[2] == InsideArgs[1] {
		if err := Inside(os.Stdin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == "hold" {
		hold(os.Args[2])
	}
	os.Exit(m.Run())
}

// hold is a lab that has one node and does nothing but live.
func hold(dir string) {
	n, err := New(Config{
		Name: filepath.Base(dir), Dir: filepath.Join(dir, "n1"), Switch: ether.New(ether.Config{}), Address: "10.88.1.1/24",
		Authority: filepath.Join(dir, "vendor"), Image: NewImage("lab", "1.0.0"),
		Services: []Service{{Name: "sleep", Argv: []string{"sleep", "1000"}}},
	})
	if err == nil {
		err = n.PowerOn(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(n.PID())
	select {}
}

// needs skips, with the reason, where nodes cannot run.
func needs(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("makes namespaces: left out of the fast tests")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs taps: %v", err)
	}
	if missing, _ := CheckHost(); len(missing) > 0 {
		t.Skipf("needs %v", missing)
	}
}

// site is a switch with nodes named n1, n2 ...
func site(t *testing.T, count int, edit func(i int, c *Config)) (*ether.Switch, []*Node) {
	t.Helper()
	needs(t)
	sw := ether.New(ether.Config{})
	dir, err := os.MkdirTemp("", "host") // short: sockets lie below
	if err != nil {
		t.Fatal(err)
	}
	var nodes []*Node
	t.Cleanup(func() {
		for _, n := range nodes {
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(sw.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	for i := range count {
		name := fmt.Sprintf("n%d", i+1)
		cfg := Config{
			Name: name, Dir: filepath.Join(dir, name), Switch: sw, Address: fmt.Sprintf("10.88.1.%d/24", i+1),
			Authority: filepath.Join(dir, "vendor"), Image: NewImage("lab", "1.0.0"),
		}
		if edit != nil {
			edit(i, &cfg)
		}
		n, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
		if err := n.PowerOn(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return sw, nodes
}

// sh runs a shell command on a node; it must end with the code.
func sh(t *testing.T, n *Node, code int, script string) string {
	t.Helper()
	out, err := n.Exec(t.Context(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	if out.Code != code {
		t.Fatalf("%s: %q: exit code %d, want %d: %s%s", n.Name(), script, out.Code, code, out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

// Nobody listens there: whoever is reached refuses (exit code 1), who is not
// reached says nothing (124).
const knock = "timeout 3 bash -c 'echo > /dev/tcp/%s/9' 2>/dev/null"

func TestNodesHearEachOther(t *testing.T) {
	sw, n := site(t, 2, nil)
	sh(t, n[0], 1, fmt.Sprintf(knock, "10.88.1.2"))
	// The twin: over a cable that is cut, nothing.
	if err := sw.SetPort("n2", ether.Faults{Cut: true}); err != nil {
		t.Fatal(err)
	}
	sh(t, n[0], 124, fmt.Sprintf(knock, "10.88.1.2"))
	sw.Heal()
	sh(t, n[1], 1, fmt.Sprintf(knock, "10.88.1.1"))
	// A new address takes the old one's place, in its network and in another.
	if err := n[1].SetAddress(t.Context(), "10.88.1.77/24", "10.88.1.1"); err != nil {
		t.Fatal(err)
	}
	sh(t, n[0], 1, fmt.Sprintf(knock, "10.88.1.77"))
	if err := n[1].SetAddress(t.Context(), "10.89.1.9/16", ""); err != nil {
		t.Fatal(err)
	}
	if out := sh(t, n[1], 0, "cat /proc/net/fib_trie"); !strings.Contains(out, "10.89.1.9") || strings.Contains(out, "10.88.1.2") {
		t.Errorf("addresses: %s", out)
	}
}

func TestNodeSeesOnlyWhatIsItsOwn(t *testing.T) {
	_, n := site(t, 2, func(_ int, c *Config) {
		c.Files = map[string][]byte{"/etc/muster/site.json": []byte("{}")}
	})
	if got := strings.TrimSpace(sh(t, n[0], 0, "hostname; cat /etc/hostname /etc/muster/site.json")); got != "n1\nn1\n{}" {
		t.Errorf("%q", got)
	}
	if n[0].ID() == n[1].ID() || n[0].ID().Validate() != nil {
		t.Errorf("the nodes are %s and %s", n[0].ID(), n[1].ID())
	}
	// From a node's network its own address is near, and ours is not there.
	if _, err := n[0].Dial(t.Context(), "tcp", "10.88.1.1:9"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialling itself: %v", err)
	}
	if _, err := n[0].Dial(t.Context(), "tcp", "192.0.2.1:9"); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dialling a network it has no way to: %v", err)
	}
	if b, err := os.ReadFile(n[1].Files() + "/etc/hostname"); string(b) != "n2\n" {
		t.Errorf("host name file of n2: %q, %v", b, err)
	}
	// Programs are the host's, and nobody can change them.
	sh(t, n[0], 1, "touch /usr/bin/mine 2>/dev/null || exit 1")
	sh(t, n[0], 0, "echo one > /var/lib/mine; echo one > /run/mine; echo one > /etc/rancher/mine")
	sh(t, n[1], 1, "cat /var/lib/mine || cat /run/mine || cat /etc/rancher/mine")
	// Processes: the first one, the TPM, and the shell with its children.
	if out := sh(t, n[0], 0, "cat /proc/1/cmdline | tr '\\0' ' '; ls -d /proc/[0-9]* | wc -l"); !strings.Contains(out, "lab node") {
		t.Errorf("%q", out)
	}
	for _, d := range []string{"/work", "/root/.ssh", "/mnt/usr"} {
		sh(t, n[0], 1, "test -e "+d)
	}
	if out := sh(t, n[0], 0, "ls /sys/class/net"); strings.Fields(out)[0] != "eth0" {
		t.Errorf("links: %q", out)
	}
}

func TestPowerCutLosesWhatWasNotSynced(t *testing.T) {
	_, n := site(t, 1, nil)
	if err := diskNeeds(); err != nil {
		t.Skipf("disks lose nothing here: %v", err)
	}
	sh(t, n[0], 0, "echo kept > /var/lib/synced; sync /var/lib/synced /var/lib; echo gone > /var/lib/unsynced; echo gone > /run/memory")
	pid := n[0].PID()
	if err := n[0].Cut(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
		t.Error("the first process is still there")
	}
	if _, on := n[0].On(); on {
		t.Error("it is on")
	}
	if err := n[0].PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, n[0], 0, "cat /var/lib/synced"); got != "kept\n" {
		t.Errorf("synced: %q", got)
	}
	sh(t, n[0], 0, "test ! -s /var/lib/unsynced")
	sh(t, n[0], 1, "test -e /run/memory")
	// The twin: after an orderly sync everything is there.
	sh(t, n[0], 0, "echo kept > /var/lib/unsynced; sync")
	if err := errors.Join(n[0].Cut(), n[0].PowerOn(t.Context())); err != nil {
		t.Fatal(err)
	}
	sh(t, n[0], 0, "grep -q kept /var/lib/unsynced")
	// A new disk has nothing.
	if n[0].ReplaceDisk() == nil {
		t.Error("the disk of a running node was replaced")
	}
	if err := errors.Join(n[0].Cut(), n[0].ReplaceDisk(), n[0].PowerOn(t.Context())); err != nil {
		t.Fatal(err)
	}
	sh(t, n[0], 1, "test -e /var/lib/synced")
}

func TestServicesStartAgain(t *testing.T) {
	lines := make(chan string, 100)
	_, n := site(t, 1, func(_ int, c *Config) {
		c.Services = []Service{{Name: "talk", Argv: []string{"sh", "-c", "echo began $WORD; sleep 1000 & wait"}, Env: []string{"WORD=once"}}}
		c.OnLine = func(service, line string) { lines <- service + ": " + line }
	})
	expect := func(want string) {
		t.Helper()
		for {
			select {
			case got := <-lines:
				if strings.Contains(got, want) {
					return
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("nobody said %q", want)
			}
		}
	}
	expect("talk: began once")
	if err := n[0].Kill(t.Context(), "talk"); err != nil {
		t.Fatal(err)
	}
	expect("talk ended: signal: killed")
	expect("talk: began once")
	if err := n[0].Stop(t.Context(), "talk"); err != nil {
		t.Fatal(err)
	}
	if n[0].Kill(t.Context(), "nobody") == nil {
		t.Error("a service that is none was killed")
	}
	// Orphans are collected: the sleeps lost their parents.
	sh(t, n[0], 0, "(sh -c 'sleep 0.01 & exit 0'); for i in 1 2 3 4 5 6 7 8 9 10; do grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || exit 0; sleep 0.1; done; exit 1")
}

// TestBootIsMeasured replays the node's event log against what its TPM says.
func TestBootIsMeasured(t *testing.T) {
	image := NewImage("lab", "1.0.0")
	events := image.Boot()
	log, err := ekcert.ParseEventLog(EventLog(events))
	if err != nil || len(log) != len(events)+1 && len(log) != len(events) {
		t.Fatalf("%d events, want %d: %v", len(log), len(events), err)
	}
	replayed := pki.Replay(log)
	if replayed[11] != [32]byte(image.Measurements.PCR11) {
		t.Errorf("PCR 11 is %x, the manifest says %s", replayed[11], image.Measurements.PCR11)
	}
	for _, pcr := range []int{0, 2, 4, 7} {
		if replayed[pcr] == [32]byte{} {
			t.Errorf("PCR %d is blank", pcr)
		}
	}
	if other := NewImage("lab", "1.0.1"); other.Measurements.PCR11 == image.Measurements.PCR11 || other.Measurements.Authenticode == image.Measurements.Authenticode {
		t.Error("two images measure alike")
	}
	if i := image.Image(); i.Kind != fleet.ImageSlot || !bytes.Equal(i.PCR11, image.Measurements.PCR11[:]) {
		t.Errorf("the image is %+v", i)
	}
}

func TestNewWhenConfigIsBadThenError(t *testing.T) {
	for _, c := range []Config{{}, {Name: "x", Dir: "relative", Switch: ether.New(ether.Config{})}, {Name: "x", Dir: "/tmp/x"}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestExecWhenNodeGoesOffThenError(t *testing.T) {
	_, n := site(t, 1, nil)
	done := make(chan error, 1)
	go func() {
		_, err := n[0].Exec(context.Background(), "sleep", "1000")
		done <- err
	}()
	sh(t, n[0], 0, "until pidof sleep >/dev/null; do :; done")
	if err := n[0].Cut(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("no error")
	}
	if _, err := n[0].Exec(t.Context(), "true"); err == nil {
		t.Error("a node that is off ran something")
	}
}

// TestNothingIsLeftWhenTheLabIsKilled: kill -9 leaves no process of a node and
// no loop device.
func TestNothingIsLeftWhenTheLabIsKilled(t *testing.T) {
	needs(t)
	dir, err := os.MkdirTemp("", "host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cmd := exec.Command(os.Args[0], "hold", dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil || pid < 2 {
		t.Fatalf("no node: %d, %v", pid, err)
	}
	processes := func() (n int) {
		list, _ := filepath.Glob("/proc/[0-9]*/root")
		for _, p := range list {
			// A process that has ended is gone or a zombie without a root.
			if _, err := os.Stat(p + "/run-tpm/tpm"); err == nil {
				if b, err := os.ReadFile(p + "/etc/hostname"); err == nil && string(b) == filepath.Base(dir)+"\n" {
					n++
				}
			}
		}
		return n
	}
	loops := func() (n int) {
		list, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, p := range list {
			if b, err := os.ReadFile(p); err == nil && strings.HasPrefix(string(b), dir) {
				n++
			}
		}
		return n
	}
	if processes() < 2 || diskNeeds() == nil && loops() != 1 {
		t.Fatalf("while it lives: %d processes, %d loop devices", processes(), loops())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// The kernel needs a moment; the time limit is the test's own.
	for processes() > 0 || loops() > 0 {
		if t.Context().Err() != nil {
			t.Fatal("something is left")
		}
		runtime.Gosched()
	}
}
