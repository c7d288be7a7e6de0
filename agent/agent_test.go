package agent

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestClock(t *testing.T) {
	site := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	build := time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)
	floor := Floor(site, build)
	if floor != build || Floor(build, site) != build || Floor(site, time.Time{}) != site {
		t.Fatalf("floor is not the later of the two: %s", floor)
	}
	first := []struct {
		name string
		rtc  time.Time
		want time.Time
		set  bool
	}{
		{"when the RTC says 1970 then the floor counts", time.Unix(0, 0), floor, true},
		{"when the RTC is a second early then the floor counts", floor.Add(-time.Second), floor, true},
		{"when the RTC is at the floor then it stays", floor, floor, false},
		{"when the RTC is ten years ahead then it stays until the centre says better", floor.AddDate(10, 0, 0), floor.AddDate(10, 0, 0), false},
	}
	for _, c := range first {
		t.Run(c.name, func(t *testing.T) {
			got, set := FirstClock(c.rtc, floor)
			if !got.Equal(c.want) || set != c.set {
				t.Errorf("got %s, %v; want %s, %v", got, set, c.want, c.set)
			}
		})
	}
	now := floor.Add(time.Hour)
	told := []struct {
		name      string
		now, told time.Time
		want      time.Time
		set, fail bool
	}{
		{"when the centre agrees then nothing is set", now, now.Add(time.Second), now, false, false},
		{"when the clock is ten years ahead then it goes back", now.AddDate(10, 0, 0), now, now, true, false},
		{"when the clock is at the floor then it goes forward", floor, now, now, true, false},
		{"when the centre is before the floor then it is refused", now, floor.Add(-time.Second), now, false, true},
		{"when the centre says 1970 then it is refused", now, time.Unix(0, 0), now, false, true},
		{"when the centre says the zero time then it is refused", now, time.Time{}, now, false, true},
	}
	for _, c := range told {
		t.Run(c.name, func(t *testing.T) {
			got, set, err := ToldClock(c.now, c.told, floor)
			if !got.Equal(c.want) || set != c.set || (err != nil) != c.fail {
				t.Errorf("got %s, %v, %v; want %s, %v, failure %v", got, set, err, c.want, c.set, c.fail)
			}
		})
	}
}

func TestStates(t *testing.T) {
	if _, err := Booting.MoveTo(Enrolled); err == nil {
		t.Error("a booting machine became enrolled")
	}
	if _, err := Failed.MoveTo(Booting); err == nil {
		t.Error("a failed machine began to boot again without a restart")
	}
	if s, err := Network.MoveTo(Time); err != nil || s != Time {
		t.Errorf("network to time: %s, %v", s, err)
	}
	if _, err := State(99).MoveTo(State(99)); err == nil {
		t.Error("a state that does not exist was kept")
	}
	for s := Booting; s <= Failed; s++ {
		if strings.Contains(s.String(), "(") {
			t.Errorf("state %d has no name", s)
		}
		if len(moves[s]) == 0 && s != Scanned {
			t.Errorf("%s cannot be left", s)
		}
	}
	if got := StateLine(WaitingForApproval, "ask\x1b[31m\nnow"); got != "muster-node: waiting-for-approval: ask?[31m now" {
		t.Errorf("line is %q", got)
	}
	if got := InitLine("v1"); got != "muster-node: init started (v1)" {
		t.Errorf("first line is %q", got)
	}
}

func TestBackoff(t *testing.T) {
	b := Backoff{First: time.Second, Most: 5 * time.Second}
	for i, want := range []time.Duration{1, 2, 4, 5, 5} {
		if got := b.Next(0); got != want*time.Second {
			t.Errorf("wait %d is %s, want %ds", i, got, want)
		}
	}
	b.Reset()
	if got := b.Next(0); got != time.Second {
		t.Errorf("after a reset: %s", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		b := Backoff{First: time.Duration(rapid.Int64Range(-5, 1<<40).Draw(t, "first")), Most: time.Duration(rapid.Int64Range(-5, 1<<40).Draw(t, "most"))}
		for range 70 {
			if d := b.Next(rapid.Float64Range(0, 0.999).Draw(t, "jitter")); d < 0 || d > max(b.Most, time.Minute) {
				t.Fatalf("wait of %s", d)
			}
		}
	})
}

func TestHeartbeat(t *testing.T) {
	h := Heartbeat{Patience: 30 * time.Second}
	h.Beat(time.Minute)
	if ok, _ := h.Alive(90 * time.Second); !ok {
		t.Error("30 s without a beat is within patience")
	}
	if ok, age := h.Alive(91 * time.Second); ok || age != 31*time.Second {
		t.Errorf("31 s without a beat: alive %v, age %s", ok, age)
	}
	h.Beat(10 * time.Second) // a late, old beat must not turn time back
	if ok, _ := h.Alive(90 * time.Second); !ok {
		t.Error("an old beat replaced a newer one")
	}
}

const goodPEM = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"

func goodSite() fleet.SiteConfig {
	return fleet.SiteConfig{
		Format: fleet.SiteConfigFormat, Image: "recovery", Version: "1",
		Centre: []string{"https://centre.example:7444"}, RootsPEM: goodPEM,
		TimeFloor: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
	}
}

func TestParseSiteConfig(t *testing.T) {
	cases := []struct {
		name   string
		change func(*fleet.SiteConfig)
		want   []string // none: good
	}{
		{"when all is plain then it is read", func(*fleet.SiteConfig) {}, nil},
		{"when address, VLAN, proxy and MAC are right then it is read", func(c *fleet.SiteConfig) {
			c.Network = fleet.NetworkConfig{Address: "192.0.2.10/24", Gateway: "192.0.2.1", DNS: []string{"192.0.2.2"}, VLAN: 7, Proxy: "http://192.0.2.3:3128", MAC: "52:54:00:AB:cd:01"}
		}, nil},
		{"when several things are wrong then all are told", func(c *fleet.SiteConfig) {
			c.Format, c.Centre, c.RootsPEM = "x", nil, ""
		}, []string{"format", "centre", "roots_pem"}},
		{"when the centre is plain http then it is refused", func(c *fleet.SiteConfig) { c.Centre = []string{"http://a"} }, []string{"centre"}},
		{"when the gateway is elsewhere then it is refused", func(c *fleet.SiteConfig) {
			c.Network = fleet.NetworkConfig{Address: "192.0.2.10/24", Gateway: "198.51.100.1"}
		}, []string{"gateway"}},
		{"when the address has no prefix length then it is refused", func(c *fleet.SiteConfig) { c.Network.Address = "192.0.2.10" }, []string{"address"}},
		{"when the VLAN does not exist then it is refused", func(c *fleet.SiteConfig) { c.Network.VLAN = 4095 }, []string{"vlan"}},
		{"when it scans then it needs no centre", func(c *fleet.SiteConfig) {
			c.Centre, c.RootsPEM, c.Scan = nil, "", &fleet.ScanConfig{Site: "shop-1"}
		}, nil},
		{"when it scans and shall call then it is refused", func(c *fleet.SiteConfig) { c.Scan = &fleet.ScanConfig{} }, []string{"scan"}},
		{"when it scans for a site that cannot be then it is refused", func(c *fleet.SiteConfig) {
			c.Centre, c.Scan = nil, &fleet.ScanConfig{Site: "No Shop"}
		}, []string{"scan.site"}},
		{"when DNS, proxy and MAC are no such things then all are told", func(c *fleet.SiteConfig) {
			c.Network = fleet.NetworkConfig{DNS: []string{"dns"}, Proxy: "socks5://x", MAC: "52:54"}
		}, []string{"dns", "proxy", "mac"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := goodSite()
			c.change(&s)
			b, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			_, err = ParseSiteConfig(b)
			if (err != nil) != (len(c.want) > 0) {
				t.Fatalf("error %v, want mentions of %v", err, c.want)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not mention %q", err, w)
				}
			}
		})
	}
	good, _ := json.Marshal(goodSite())
	for name, b := range map[string]string{
		"unknown field":  strings.Replace(string(good), `"image"`, `"imge"`, 1),
		"trailing bytes": string(good) + "{}",
		"empty":          "",
		"too long":       string(good) + strings.Repeat(" ", MaxSiteConfig),
	} {
		if _, err := ParseSiteConfig([]byte(b)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseSiteConfig(f *testing.F) {
	good, _ := json.Marshal(goodSite())
	f.Add(good)
	f.Add([]byte(`{"format":"muster/site-config/v1","centre":["https://a"],"network":{"address":"::1/0","gateway":"::2"}}`))
	f.Add([]byte(`{}x`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseSiteConfig(b)
		if err == nil && (len(c.Centre) == 0 || c.RootsPEM == "") {
			t.Fatal("accepted without centre or roots")
		}
	})
}

func views() map[string]View {
	return map[string]View{
		"booting": {Version: "v0.1", State: Booting, Text: "looking for devices"},
		"waiting": {
			Version: "v0.1", Image: "recovery 2026.11.20", Words: "amber canoe delta fable orbit tulip",
			Node: "n-abcdefghijklmnopqrstuvwx", EK: strings.Repeat("0123456789abcdef", 4),
			State: WaitingForApproval, Text: "ask your administrator to approve this machine; compare the six words",
			InState: 7 * time.Minute, Request: "r-abcdefghijklmnopqrstuvwx",
			Centre: []string{"https://centre.example:7444", "https://192.0.2.1:7444"},
			NICs:   []NICView{{"eth0", "52:54:00:12:34:56", "10.77.0.20/24 via 10.77.0.1"}, {"eth1", "52:54:00:12:34:57", "no link"}},
			Notes:  []string{"the clock said 1970-01-01"},
			Recent: []string{"muster-node: init started (v0.1)", "muster-node: time: address 10.77.0.20 on eth0"},
		},
		"hostile": {
			Version: "v0.1", State: Failed, Text: "\x1b[2J\u202eevil\x07 " + strings.Repeat("x", 300),
			NICs: []NICView{{"eth0", "\x1b[1m", "\n\n\n"}},
		},
	}
}

// A scan ends in letters that can be read from afar, and shows no network.
func TestBanner(t *testing.T) {
	v := View{Scan: true, State: Scanned, Text: "pull the stick out"}
	done := Screen(v, 80)
	v.State = Failed
	stop := Screen(v, 80)
	v.State = Scanning
	busy := Screen(v, 80)
	for name, s := range map[string]string{"done": done, "stop": stop} {
		if strings.Count(s, "#") < 40 || strings.Contains(s, "network") {
			t.Errorf("%s:\n%s", name, s)
		}
	}
	if strings.Contains(busy, "#") || done == stop {
		t.Errorf("busy:\n%s", busy)
	}
	for _, b := range []string{bannerDone, bannerStop} {
		for line := range strings.Lines(b) {
			if len(line) > minWidth {
				t.Errorf("%q is too wide", line)
			}
		}
	}
}

func TestScreenGolden(t *testing.T) {
	for name, v := range views() {
		for _, width := range []int{40, 80} {
			file := filepath.Join("testdata", name+"-"+map[int]string{40: "40", 80: "80"}[width]+".txt")
			got := Screen(v, width) + "\n"
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs (go test ./agent -update writes it anew):\n%s", file, got)
			}
		}
	}
}

func TestScreenIsAlwaysPrintableAndFits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.String()
		v := View{
			Version: s.Draw(t, "version"), Image: s.Draw(t, "image"), Words: s.Draw(t, "words"), EK: s.Draw(t, "ek"),
			Node: s.Draw(t, "node"), Text: s.Draw(t, "text"), Request: s.Draw(t, "request"),
			Centre: rapid.SliceOfN(s, 0, 3).Draw(t, "centre"), Notes: rapid.SliceOfN(s, 0, 3).Draw(t, "notes"),
			Recent: rapid.SliceOfN(s, 0, 20).Draw(t, "recent"),
			NICs:   []NICView{{s.Draw(t, "nic"), s.Draw(t, "mac"), s.Draw(t, "what")}},
		}
		width := rapid.IntRange(-1, 132).Draw(t, "width")
		for line := range strings.SplitSeq(Screen(v, width), "\n") {
			if len(line) > max(width, minWidth) {
				t.Fatalf("line of %d on a screen of %d: %q", len(line), width, line)
			}
			for _, r := range line {
				if r < ' ' || r > '~' {
					t.Fatalf("unprintable %q in %q", r, line)
				}
			}
		}
	})
}
