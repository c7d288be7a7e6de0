package discovery

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestScenarios plays testdata/*.txt: lines "TIME VERB ARGS..." and, below
// each, what came of it, indented. -update writes the outcomes anew.
//
//	hint SOURCE ADDR [bye] [tag=T] [run=INSTANCE] [via=N] [ttl=D]
//	run UNTIL      dials as Wake says; nobody answers
//	proven ADDR N, failed ADDR unreachable|stranger|self, forget N, expire
//	restart        Memory, a new table, Restore
//	peers, addresses
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scenarios", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, want)
			if *update {
				if err := os.WriteFile(f, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s; it is now:\n%s", f, got)
			}
		})
	}
}

func play(t *testing.T, script []byte) []byte {
	tab := newTable(t, nil)
	var out bytes.Buffer
	say := func(format string, args ...any) {
		fmt.Fprintln(&out, "\t"+strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
	names := map[string]string{}
	for i := range 20 {
		names[string(nodeN(i))] = fmt.Sprintf("node%d", i)
	}
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	dur := func(s string) time.Duration {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	sources := map[string]Source{"mdns": SourceMulticast, "peer": SourcePeer, "configured": SourceConfigured}
	failures := map[string]Failure{"unreachable": Unreachable, "stranger": Stranger, "self": Self}
	sc := bufio.NewScanner(bytes.NewReader(script))
	for sc.Scan() {
		line := sc.Text()
		if strings.HasPrefix(line, "\t") {
			continue
		}
		fmt.Fprintln(&out, line)
		w := strings.Fields(line)
		if len(w) == 0 || w[0] == "#" {
			continue
		}
		now := start.Add(dur(w[0]))
		switch w[1] {
		case "hint":
			h := Hint{Source: sources[w[2]], Addr: at(w[3]), TTL: AdvertTTL}
			if h.Source == SourceMulticast {
				h.Tag, h.Instance = siteTag, "run1"
			}
			for _, o := range w[4:] {
				k, v, _ := strings.Cut(o, "=")
				switch k {
				case "bye":
					h.Goodbye = true
				case "tag":
					h.Tag = SiteTag(v)
				case "run":
					h.Instance = v
				case "via":
					h.Via = nodeN(number(v))
				case "ttl":
					h.TTL = dur(v)
				}
			}
			say("%s", tab.Observe(now, h))
		case "run":
			end := start.Add(dur(w[2]))
			for {
				wake, ok := tab.Wake(now)
				if !ok || wake.After(end) {
					break
				}
				now = wake
				for _, d := range tab.Dials(now) {
					say("%s dial %s %s try %d %s", now.Sub(start).Round(time.Millisecond), d.Addr, d.Why, d.Try, names[string(d.Node)])
				}
			}
		case "proven":
			tab.Proven(now, at(w[2]), nodeN(number(w[3])))
		case "failed":
			tab.Failed(now, at(w[2]), failures[w[3]])
		case "forget":
			tab.Forget(now, nodeN(number(w[2])))
		case "expire":
			tab.Expire(now)
		case "restart":
			m := tab.Memory()
			tab = newTable(t, nil)
			tab.Restore(now, m)
		case "peers":
			for _, p := range tab.Peers() {
				say("%s %s %v", names[string(p.Node)], p.State, p.Addrs)
			}
		case "addresses":
			for _, a := range tab.Addresses() {
				say("%s %s %s", a.Addr, a.State, names[string(a.Node)])
			}
		default:
			t.Fatalf("unknown verb %q", w[1])
		}
	}
	return out.Bytes()
}
