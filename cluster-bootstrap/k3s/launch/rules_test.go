package launch

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDecide is the state table, row by row.
func TestDecide(t *testing.T) {
	const now, limit = time.Hour, 90 * time.Second
	base := facts{now: now, allowed: true, joins: true, datastore: true, role: RoleNote{Role: Server}}
	for _, c := range []struct {
		name   string
		change func(*facts)
		want   act
		why    string
	}{
		{"a server starts", func(*facts) {}, start, ""},
		{"a founder starts", func(f *facts) { f.datastore, f.init, f.joins = false, true, false }, start, ""},
		{"told to end", func(f *facts) { f.stop = true }, end, ""},
		{"not allowed in this boot", func(f *facts) { f.allowed = false }, end, ""},
		{"no role", func(f *facts) { f.role = RoleNote{} }, wait, "no role file"},
		{"torn role", func(f *facts) { f.roleErr = os.ErrInvalid }, wait, "invalid"},
		{"bad config", func(f *facts) { f.configErr = os.ErrInvalid }, wait, "invalid"},
		{"pause", func(f *facts) { f.pause = now + 1 }, wait, ""},
		{"pause is over", func(f *facts) { f.pause = now }, start, ""},
		{"in the way", func(f *facts) { f.inTheWay = "process 7" }, wait, "process 7"},
		{"a server that lost its data", func(f *facts) { f.datastore = false }, wait, "new cluster"},
		{"a server with tombstone", func(f *facts) { f.tombstone = true }, wait, "tombstone"},
		{"a founder with tombstone", func(f *facts) { f.tombstone, f.init = true, true }, wait, "tombstone"},
		{"a worker starts", func(f *facts) { f.role.Role, f.datastore = Worker, false }, start, ""},
		{"a worker without server", func(f *facts) { f.role.Role, f.joins = Worker, false }, wait, "no server"},
		{"a candidate without lease", func(f *facts) { f.role.Role = Candidate }, wait, "lease"},
		{"a candidate with a lease too short", func(f *facts) { f.role.Role, f.lease = Candidate, now+minLease-1 }, wait, "lease"},
		{"a candidate", func(f *facts) { f.role.Role, f.lease = Candidate, now+minLease }, start, ""},
		{"a candidate with cluster-init", func(f *facts) {
			f.role.Role, f.lease, f.init, f.joins, f.datastore = Candidate, now+time.Minute, true, false, false
		}, wait, "names no server"},
		{"a candidate with tombstone", func(f *facts) { f.role.Role, f.lease, f.tombstone = Candidate, now+time.Minute, true }, wait, "tombstone"},
		{"a joiner needs no lease", func(f *facts) { f.role.Role = Joiner }, start, ""},
		{"a joiner without server", func(f *facts) { f.role.Role, f.joins = Joiner, false }, wait, "names no server"},
		{"a joiner with tombstone", func(f *facts) { f.role.Role, f.tombstone = Joiner, true }, wait, "tombstone"},

		{"runs on", func(f *facts) { f.child = &running{role: Server} }, wait, ""},
		{"runs: told to end", func(f *facts) { f.child, f.stop = &running{role: Server}, true }, term, ""},
		{"runs: permission withdrawn", func(f *facts) { f.child, f.allowed = &running{role: Worker}, false; f.role.Role = Worker }, term, ""},
		{"runs: told before", func(f *facts) { f.child, f.stop = &running{role: Server, termed: now - limit}, true }, wait, ""},
		{"runs: for too long", func(f *facts) { f.child, f.stop = &running{role: Server, termed: now - limit - 1}, true }, kill, "in time"},
		{"runs: another role", func(f *facts) { f.child = &running{role: Worker} }, term, "role changed"},
		{"runs: torn role file", func(f *facts) { f.child, f.role, f.roleErr = &running{role: Server}, RoleNote{}, os.ErrInvalid }, wait, ""},
		{"runs: lost role file", func(f *facts) { f.child, f.role = &running{role: Server}, RoleNote{} }, term, "role changed"},
		{"candidate: lease holds", func(f *facts) { f.child, f.role.Role, f.lease = &running{role: Candidate}, Candidate, now+termBefore+1 }, wait, ""},
		{"candidate: lease ends", func(f *facts) { f.child, f.role.Role, f.lease = &running{role: Candidate}, Candidate, now+termBefore }, term, "lease ends"},
		{"candidate: told before", func(f *facts) {
			f.child, f.role.Role, f.lease = &running{role: Candidate, termed: now - 1}, Candidate, now+killBefore+1
		}, wait, ""},
		{"candidate: lease over", func(f *facts) { f.child, f.role.Role, f.lease = &running{role: Candidate}, Candidate, now+killBefore }, kill, "ended"},
		{"candidate: no lease", func(f *facts) { f.child, f.role.Role = &running{role: Candidate}, Candidate }, kill, "ended"},
		{"candidate: no lease, torn role", func(f *facts) { f.child, f.role, f.roleErr = &running{role: Candidate}, RoleNote{}, os.ErrInvalid }, kill, "ended"},
		{"candidate: no lease, lost role", func(f *facts) { f.child, f.role = &running{role: Candidate}, RoleNote{} }, kill, "ended"},
		{"candidate: torn role that claims to be server", func(f *facts) { f.child, f.roleErr = &running{role: Candidate}, os.ErrInvalid }, kill, "ended"},
		{"candidate: no lease, told to end", func(f *facts) { f.child, f.stop, f.role.Role = &running{role: Candidate}, true, Candidate }, kill, "ended"},
		{"candidate: confirmed", func(f *facts) { f.child = &running{role: Candidate} }, wait, ""},
		{"candidate: becomes worker", func(f *facts) { f.child, f.role.Role, f.lease = &running{role: Candidate}, Worker, now+time.Minute }, term, "role changed"},
		{"joiner: no lease", func(f *facts) { f.child, f.role.Role = &running{role: Joiner}, Joiner }, wait, ""},
		{"joiner: confirmed", func(f *facts) { f.child = &running{role: Joiner} }, wait, ""},
		{"server: becomes candidate", func(f *facts) { f.child, f.role.Role = &running{role: Server}, Candidate }, term, "role changed"},
	} {
		f := base
		c.change(&f)
		got, why := decide(f, limit)
		if got != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s: %d %q, want %d %q", c.name, got, why, c.want, c.why)
		}
	}
}

// TestDecideNever goes through all combinations for what must never happen.
func TestDecideNever(t *testing.T) {
	const now, limit = time.Hour, 90 * time.Second
	bools := []bool{false, true}
	for _, role := range []Role{NoRole, Worker, Candidate, Joiner, Server} {
		for _, torn := range bools {
			for _, lease := range []time.Duration{0, now - 1, now + killBefore, now + minLease, now + time.Minute} {
				for mask := range 1 << 6 {
					bit := func(i int) bool { return mask>>i&1 == 1 }
					f := facts{now: now, role: RoleNote{Role: role}, lease: lease, stop: bit(0), allowed: bit(1), init: bit(2), datastore: bit(3), tombstone: bit(4), joins: bit(5)}
					if torn {
						f.roleErr = os.ErrInvalid
					}
					if do, _ := decide(f, limit); do == start {
						switch {
						case f.stop || !f.allowed || torn || role == NoRole:
							t.Errorf("started although it may not: %+v", f)
						case role == Candidate && lease < now+minLease:
							t.Errorf("a candidate started without a lease: %+v", f)
						case !f.datastore && !f.joins && !(role == Server && f.init):
							t.Errorf("k3s would make a cluster that nobody allowed: %+v", f)
						case role == Server && !f.datastore && !f.init:
							t.Errorf("a server without data would join by itself: %+v", f)
						case role != Worker && f.tombstone:
							t.Errorf("a removed member would join again by itself: %+v", f)
						}
					}
					f.child = &running{role: Candidate}
					confirmed := role == Server && !torn
					if do, _ := decide(f, limit); do == wait && !confirmed && lease <= now+termBefore {
						t.Errorf("a candidate runs on without a lease: %+v", f)
					}
				}
			}
		}
	}
}

func TestLeaseHolds(t *testing.T) {
	const now = time.Hour
	good := Lease{Plan: "p", Boot: "b", Until: now + 30*time.Second}
	if good.holds("p", "b", now) != good.Until || good.holds("", "b", now) != good.Until {
		t.Error("a good lease does not hold")
	}
	for name, bad := range map[string]func(*Lease){
		"other plan":    func(l *Lease) { l.Plan = "q" },
		"other boot":    func(l *Lease) { l.Boot = "c" },
		"over":          func(l *Lease) { l.Until = now },
		"far too long":  func(l *Lease) { l.Until = now + MaxLease + 1 },
		"negative":      func(l *Lease) { l.Until = -1 },
		"largest there": func(l *Lease) { l.Until = 1<<63 - 1 },
	} {
		l := good
		bad(&l)
		if l.holds("p", "b", now) != 0 {
			t.Errorf("%s: holds", name)
		}
	}
}

func TestCheckConfig(t *testing.T) {
	d := t.TempDir()
	p := Paths{Config: d}
	write := func(name, text string) {
		t.Helper()
		if err := WriteBytes(filepath.Join(d, name), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := checkConfig(p, Server); err == nil {
		t.Error("no config")
	}
	for _, c := range []struct {
		role          Role
		config, extra string
		joins, bad    bool
	}{
		{Server, "node-name: x\n", "", false, false},
		{Server, "server: https://100.96.0.1:6443\n", "", true, false},
		{Server, "server: http://100.96.0.1:6443\n", "", false, false},
		{Server, "cluster-init: true\n", "", false, true},
		{Server, "cluster-init+: true\n", "", false, true},
		{Server, "{", "", false, true},
		{Server, "node-name: x\n", "kube-apiserver-arg: [v=4]\n", false, false},
		{Server, "node-name: x\n", "cluster-init: true\n", false, true},
		{Server, "node-name: x\n", "server: https://evil:6443\n", false, true},
		{Server, "node-name: x\n", "etcd-arg+: [max-learners=1]\n", false, true},
		{Server, "node-name: x\n", "[1, 2]\n", false, true},
		{Worker, "server: https://100.96.0.1:6443\n", "kubelet-arg: [v=4]\n", true, false},
		{Worker, "server: https://100.96.0.1:6443\ntls-san: [x]\n", "", false, true},
		{Worker, "server: https://100.96.0.1:6443\n", "kube-apiserver-arg: [v=4]\n", false, true},
	} {
		write("config.yaml", c.config)
		write("config.yaml.d/10-own.yaml", c.extra)
		joins, err := checkConfig(p, c.role)
		if (err != nil) != c.bad || err == nil && joins != c.joins {
			t.Errorf("%s %q %q: %v %v", c.role, c.config, c.extra, joins, err)
		}
	}
}

func TestReadRole(t *testing.T) {
	p := Paths{State: t.TempDir()}
	if n, err := p.ReadRole(); err != nil || n.Role != NoRole {
		t.Error(n, err)
	}
	for text, good := range map[string]bool{`{"role":"worker"}`: true, `{"role":"candidate","plan":"p"}`: true, `{"role":"king"}`: false, `{"role":""}`: false,
		`{"role":"server"`: false, "": false, strings.Repeat(" ", maxFile) + `{"role":"server"}`: false} {
		if err := WriteBytes(p.RoleFile(), []byte(text)); err != nil {
			t.Fatal(err)
		}
		if n, err := p.ReadRole(); (err == nil) != good || !good && n.Role != NoRole {
			t.Errorf("%.40q: %v %v", text, n, err)
		}
	}
}

func TestPause(t *testing.T) {
	l := &Launcher{cfg: Config{Pause: 5 * time.Second, MaxPause: time.Minute}}
	var got []time.Duration
	for i := range 12 {
		l.starts = i + 1
		l.setPause(0)
		got = append(got, l.pause)
	}
	s := time.Second
	if want := []time.Duration{5 * s, 5 * s, 5 * s, 5 * s, 5 * s, 5 * s, 10 * s, 20 * s, 40 * s, 60 * s, 60 * s, 60 * s}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
}

func TestProcess(t *testing.T) {
	me, err := identify(os.Getpid())
	if err != nil || !me.Alive() {
		t.Fatal(me, err)
	}
	for name, bad := range map[string]Process{
		"reused PID":   {PID: me.PID, Start: me.Start + 1, Boot: me.Boot},
		"another boot": {PID: me.PID, Start: me.Start, Boot: "x"},
		"nobody":       {PID: 1 << 30, Start: me.Start, Boot: me.Boot},
		"zero":         {},
	} {
		if bad.Alive() {
			t.Errorf("%s: alive", name)
		}
		if err := bad.End(t.Context(), time.Second); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if (*Process)(nil).Alive() || (*Process)(nil).End(t.Context(), time.Second) != nil {
		t.Error("nil")
	}
}

func FuzzFiles(f *testing.F) {
	f.Add([]byte(`{"role":"candidate","plan":"p"}`))
	f.Add([]byte(`{"plan":"p","boot":"b","until":3600000000001}`))
	f.Add([]byte(`{"launcher":{"pid":1}}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		p := Paths{State: dir, Run: dir}
		for _, file := range []string{p.RoleFile(), p.LeaseFile(), p.GoFile(), p.StatusFile(), p.ProcessFile()} {
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		n, err := p.ReadRole()
		if err != nil && n.Role != NoRole {
			t.Errorf("role %q with %v", n.Role, err)
		}
		if u := p.readLease("p", "b", time.Hour); u != 0 && (u <= time.Hour || u > time.Hour+MaxLease) {
			t.Errorf("lease until %s", u)
		}
		if p.allowed("never this boot") {
			t.Error("allowed")
		}
		_, _ = p.ReadStatus()
	})
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) b) c) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99 1 2"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _, _ = parseStat(b) })
}

func FuzzNotify(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=up\nMAINPID=3"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m := parseNotify(b); len(m.status) > 200 || strings.ContainsAny(m.status, "\n\x1b") {
			t.Errorf("%q", m.status)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("server: https://x\nnode-label+: [a=b]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseConfig(b)
		if err != nil {
			return
		}
		if _, err := json.Marshal(m); err != nil {
			t.Error(err)
		}
	})
}
