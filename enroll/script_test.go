package enroll

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// TestScripts plays testdata/*.script and compares what was decided with the
// golden file beside it. A line is "TIME VERB key=value...", TIME a duration
// since the start; # begins a comment.
//
//	file tpm=a serial=S boot=unknown identity=listed pcr7=x keys=2 clock=MS resets=N begun=TIME
//	approve|reject|release|isolate tpm=a [actor=] [site=] [reason=] [seen=REVISION] [lab] [old]
//	        old: the request of the TPM's first evidence, not the live one
//	deny|allow tpm=a        issue tpm=a [key=other]
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.script")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, path := range scripts {
		name := strings.TrimSuffix(filepath.Base(path), ".script")
		t.Run(name, func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".golden", play(t, string(b)))
		})
	}
}

func play(t *testing.T, script string) string {
	s := newStore()
	var out strings.Builder
	for n, line := range strings.Split(script, "\n") {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if len(words) < 2 {
			t.Fatalf("line %d: %q", n+1, line)
		}
		args := map[string]string{}
		for _, w := range words[2:] {
			k, v, _ := strings.Cut(w, "=")
			args[k] = strings.ReplaceAll(v, "_", " ")
		}
		at := when(t, words[0])
		fmt.Fprintf(&out, "> %s\n", strings.TrimSpace(line))
		facts := len(s.facts)
		step(t, &out, s, at, words[1], args)
		for _, f := range s.facts[facts:] {
			fmt.Fprintf(&out, "  audit %s %s %s->%s: %s\n", f.Kind, names(s, f.Request), f.Before, f.After, rename(s, f.Reason))
		}
	}
	return out.String()
}

func step(t *testing.T, out *strings.Builder, s *store, at time.Time, verb string, args map[string]string) {
	e := evidence(args["tpm"])
	node := e.EK.NodeID()
	if verb == "file" {
		d, err := s.file(at, scripted(t, e, args, at))
		if err != nil {
			fmt.Fprintf(out, "  error: %v\n", err)
			return
		}
		fmt.Fprintf(out, "  %s: %s\n", d.Action, rename(s, d.Reason))
		show(out, s, d.Request)
		return
	}
	var r fleet.Request
	if live := s.live(node); len(live) > 0 {
		r = live[0]
	} else if all := s.of(node); len(all) > 0 {
		r = all[0]
	}
	if _, old := args["old"]; old {
		r = s.requests[fleet.RequestIDOf(EvidenceDigest(e))]
	}
	ruling := Ruling{Revision: r.Revision, Actor: "user:eve", Reason: args["reason"]}
	if v, ok := args["seen"]; ok {
		ruling.Revision = int64(number(t, v))
	}
	if v, ok := args["actor"]; ok {
		ruling.Actor = v
	}
	var f Fact
	var err error
	switch verb {
	case "approve":
		_, lab := args["lab"]
		r, f, err = Approve(at, r, Approval{Ruling: ruling, Site: args["site"], Policy: Policy{Lab: lab, UnknownBoot: lab, Unverified: lab}})
	case "reject":
		r, f, err = Reject(at, r, ruling)
	case "release":
		r, f, err = Release(at, r, ruling)
	case "isolate":
		r, f, err = Isolate(at, r, ruling)
	case "allow":
		delete(s.denied, node)
		return
	case "deny":
		s.denied[node] = true
		var ok bool
		if r, f, ok = Deny(at, s.of(node), ruling); !ok {
			fmt.Fprintf(out, "  nothing to change\n")
			return
		}
	case "issue":
		key := r.Evidence.LDevIDKey
		if args["key"] != "" {
			key = hashOf(args["key"])
		}
		r, f, err = Issue(at, r, Issued{Serial: "01", LDevIDKey: key})
	default:
		t.Fatalf("no verb %q", verb)
	}
	var refused *Refused
	switch {
	case errors.As(err, &refused), errors.Is(err, ErrConflict), errors.Is(err, ErrNotApproved):
		fmt.Fprintf(out, "  %v\n", rename(s, err.Error()))
		return
	case err != nil:
		t.Fatal(err)
	}
	s.requests[r.ID] = r
	s.facts = append(s.facts, f)
	show(out, s, r)
}

func scripted(t *testing.T, e fleet.Evidence, args map[string]string, at time.Time) Filing {
	f := filing(e, uint64(at.Sub(start).Milliseconds())+1, at.Add(-time.Second))
	for k, v := range args {
		switch k {
		case "tpm":
		case "serial":
			f.Evidence.Serial = v
		case "uuid":
			f.Evidence.UUID = v
		case "image":
			f.Evidence.Image = v
		case "pcr7":
			f.Evidence.PCRs[7] = hashOf(v)
		case "keys":
			f.Evidence.AKName, f.Evidence.LDevIDName, f.Evidence.LDevIDKey = hashOf("ak"+v), hashOf("ln"+v), hashOf("lk"+v)
		case "boot":
			if err := f.Evidence.Boot.UnmarshalText([]byte(v)); err != nil {
				t.Fatal(err)
			}
		case "identity":
			if err := f.Evidence.Identity.UnmarshalText([]byte(v)); err != nil {
				t.Fatal(err)
			}
		case "clock":
			f.Clock.Millis = uint64(number(t, v))
		case "resets":
			f.Clock.Resets = uint32(number(t, v))
		case "begun":
			f.Begun = when(t, v)
		case "max":
			f.MaxUnverified = number(t, v)
		default:
			t.Fatalf("no argument %q", k)
		}
	}
	return f
}

func show(out *strings.Builder, s *store, r fleet.Request) {
	fmt.Fprintf(out, "  %s is %s, revision %d", names(s, r.ID), r.State, r.Revision)
	if r.Site != "" {
		fmt.Fprintf(out, ", site %s", r.Site)
	}
	if r.Supersedes != "" {
		fmt.Fprintf(out, ", supersedes %s", names(s, r.Supersedes))
	}
	fmt.Fprintln(out)
	for _, w := range r.Warnings {
		fmt.Fprintf(out, "    warning: %s\n", rename(s, w))
	}
}

// names keeps golden files readable: the start of an ID is enough.
func names(_ *store, id fleet.RequestID) string { return string(id[:8]) }

func rename(s *store, text string) string {
	for id, r := range s.requests {
		text = strings.ReplaceAll(text, string(id), names(s, id))
		text = strings.ReplaceAll(text, string(r.Node), string(r.Node[:8]))
	}
	return text
}

func when(t *testing.T, s string) time.Time {
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return start.Add(d)
}

func number(t *testing.T, s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
