package scenario

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
)

// What one run made the next takes; other inputs are another thing, and a
// build that failed leaves nothing.
func TestDepot(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	l := lab.ForTest(t.TempDir())
	built := 0
	build := func(dir string) error {
		built++
		return os.WriteFile(filepath.Join(dir, "x"), []byte("image"), 0o600)
	}
	digest := func(text string) string {
		in := &inputs{}
		in.text("name", text)
		d, err := in.digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for range 2 {
		dir, err := kept(l, "slot", digest("a"), build)
		if b, rerr := os.ReadFile(filepath.Join(dir, "x")); err != nil || rerr != nil || string(b) != "image" {
			t.Fatal(dir, err, rerr)
		}
	}
	if _, err := kept(l, "slot", digest("b"), build); err != nil || built != 2 {
		t.Errorf("%d builds for two images (%v)", built, err)
	}
	broken := errors.New("no space")
	if _, err := kept(l, "slot", digest("c"), func(string) error { return broken }); !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := kept(l, "slot", digest("c"), build); err != nil || built != 3 {
		t.Errorf("what failed once is not tried again (%v)", err)
	}
	in := &inputs{}
	in.file("gone", filepath.Join(t.TempDir(), "nothing"))
	if _, err := in.digest(); err == nil {
		t.Error("a file that is not there has a digest")
	}
}

// Only what nobody used for long goes, and only beyond a few.
func TestDepotTidies(t *testing.T) {
	depot := t.TempDir()
	now := time.Now()
	for i := range depotKept + 3 {
		dir := filepath.Join(depot, "slot-"+string(rune('a'+i)))
		used := now.Add(-time.Duration(i) * 24 * time.Hour)
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chtimes(dir, used, used)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(depot, "keys-z"), 0o700); err != nil {
		t.Fatal(err)
	}
	tidy(depot, "slot", now)
	left, err := os.ReadDir(depot)
	if err != nil || len(left) != depotKept+1 {
		t.Errorf("%d are left: %v %v", len(left), left, err)
	}
}

// Every write to a disk shows, also one of zeros.
func TestDiskSum(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk.img")
	if err := makeDisk(name, 64<<20, somebodysDisk()); err != nil {
		t.Fatal(err)
	}
	p := &pc{other: name}
	var err error
	if p.otherSum, err = diskSum(name); err != nil {
		t.Fatal(err)
	}
	if err := p.untouched(); err != nil {
		t.Error(err)
	}
	for _, b := range [][]byte{bytes.Repeat([]byte{0}, 64<<10), []byte("x")} {
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(b, 32<<20)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if p.untouched() == nil {
			t.Error("a write does not show")
		}
		if p.otherSum, err = diskSum(name); err != nil {
			t.Fatal(err)
		}
	}
	blank := filepath.Join(t.TempDir(), "blank.img")
	if err := makeDisk(blank, 1<<20, nil); err != nil {
		t.Fatal(err)
	}
	if err := empty(blank); err != nil {
		t.Error(err)
	}
	if empty(name) == nil {
		t.Error("a disk with data is called empty")
	}
}

// What a thief of the disk sees is judged: no encryption, no seal, words in
// the clear.
func TestSealed(t *testing.T) {
	parts, err := firmware.Layout(diskSize, 512)
	if err != nil {
		t.Fatal(err)
	}
	data := parts[len(parts)-1]
	const good = `{"keyslots":{"0":{},"1":{}},"tokens":{"0":{"type":"systemd-tpm2","tpm2-pcrs":[7]}}}`
	for name, row := range map[string]struct {
		header, text string
		ok           bool
	}{
		"sealed":           {good, "noise", true},
		"not encrypted":    {"", "noise", false},
		"not sealed":       {`{"keyslots":{"0":{},"1":{}},"tokens":{}}`, "noise", false},
		"no recovery key":  {`{"keyslots":{"0":{}},"tokens":{"0":{"type":"systemd-tpm2","tpm2-pcrs":[7]}}}`, "noise", false},
		"in the clear":     {good, "namespace kube-system", false},
		"header is broken": {"{", "noise", false},
	} {
		file := filepath.Join(t.TempDir(), "disk.img")
		if err := makeDisk(file, diskSize, nil); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 4096)
		if row.header != "" {
			copy(head, "LUKS\xba\xbe\x00\x02")
		}
		_, err1 := f.WriteAt(append(head, row.header...), data.Start)
		_, err2 := f.WriteAt(append(bytes.Repeat([]byte{7}, 20<<20), row.text...), data.Start+16<<20)
		if err := errors.Join(err1, err2, f.Close()); err != nil {
			t.Fatal(err)
		}
		p := &pc{disk: file}
		if err := p.sealed(); (err == nil) != row.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A site is judged by what its nodes say to the centre.
func TestSiteView(t *testing.T) {
	node := func(id fleet.NodeID, role, uid string, voters, ready int, blocker string) siteNodeView {
		return siteNodeView{Node: fleet.Node{ID: id, Words: string(id)}, Report: &fleet.NodeReport{Role: role, UID: uid, Voters: voters, NodesReady: ready, Blocker: blocker, At: time.Unix(100, 0)}}
	}
	one := siteView{Nodes: []siteNodeView{node("a", "server", "c1", 1, 1, fewNodes)}}
	three := siteView{Nodes: []siteNodeView{node("a", "server", "c1", 3, 3, ""), node("b", "server", "c1", 3, 3, ""), node("c", "server", "c1", 3, 3, "")}}
	if err := errors.Join(one.servers(1), three.servers(3), one.oneCluster(), three.oneCluster()); err != nil {
		t.Error(err)
	}
	for name, s := range map[string]siteView{
		"a node is not ready":  {Nodes: []siteNodeView{node("a", "server", "c1", 1, 0, "")}},
		"nobody said anything": {Nodes: []siteNodeView{{Node: fleet.Node{ID: "a"}}}},
		"it has no cluster":    {Nodes: []siteNodeView{node("a", "server", "", 1, 1, "")}},
		"it waits":             {Nodes: []siteNodeView{node("a", "server", "c1", 1, 1, "no-quorum")}},
		"a worker":             {Nodes: []siteNodeView{node("a", "worker", "c1", 0, 0, "")}},
	} {
		if s.servers(1) == nil {
			t.Errorf("%s: it is called a whole site", name)
		}
	}
	two := siteView{Nodes: []siteNodeView{node("a", "server", "c1", 1, 1, ""), node("b", "server", "c2", 1, 1, "")}}
	if two.oneCluster() == nil || (siteView{Site: fleet.Site{Status: fleet.SiteStatus{Second: "c2"}}}).oneCluster() == nil {
		t.Error("two clusters are called one")
	}
	lost := siteView{Nodes: []siteNodeView{node("a", "server", "c1", 3, 3, ""), node("b", "server", "c1", 3, 2, ""), node("c", "server", "c1", 3, 2, "")}}
	if err := lost.without("a", time.Unix(50, 0)); err != nil {
		t.Error(err)
	}
	if lost.without("a", time.Unix(200, 0)) == nil || three.without("a", time.Unix(50, 0)) == nil || lost.without("b", time.Unix(50, 0)) == nil {
		t.Error("a site that has not noticed the loss goes for one that lives without")
	}
}
