package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/agent/member/local"
	"github.com/muster-edge/muster/agent/slots"
	"github.com/muster-edge/muster/agent/slots/metal"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet/text"
)

const slotUsage = `usage: muster-node slot COMMAND
  list [-o json]          the two slots, what runs, what the next start takes
  rollback REASON         go back to the system before, and restart
  mark-bad a|b REASON     never start the system in the other slot by itself again
  forgive [DIGEST]        try an image again that failed here (default: all)
  recover REASON          restart into the recovery image
  trial                   restart if a new system is on trial and its agent does not live`

// runDir is the agent's volatile directory.
const runDir = "/run/muster"

// slotCommand is `muster-node slot`: what a person at the box can do about the
// system. The agent need not run.
func slotCommand(args []string) int {
	usage := func() int { fmt.Fprintln(os.Stderr, slotUsage); return 2 }
	if len(args) == 0 {
		return usage()
	}
	rest := args[1:]
	reason := strings.TrimSpace(strings.Join(rest, " "))
	var do func(slots.Desk) error
	switch args[0] {
	case "list":
		asJSON := len(rest) == 2 && rest[0] == "-o" && rest[1] == "json"
		if len(rest) > 0 && !asJSON {
			return usage()
		}
		do = func(d slots.Desk) error { return listSlots(d, asJSON) }
	case "rollback":
		if reason == "" {
			return usage()
		}
		do = func(d slots.Desk) error {
			from, to, err := d.Rollback(reason, restart)
			if err == nil {
				fmt.Printf("Version %s is marked bad; this machine restarts into version %s.\n", from.Version, to.Version)
			}
			return err
		}
	case "mark-bad":
		id, ok := slotNames[first(rest)]
		reason = strings.TrimSpace(strings.Join(rest[min(1, len(rest)):], " "))
		if !ok || reason == "" {
			return usage()
		}
		do = func(d slots.Desk) error { return d.MarkBad(id, reason) }
	case "forgive":
		var digest firmware.Digest
		if len(rest) > 1 || len(rest) == 1 && digest.UnmarshalText([]byte(rest[0])) != nil {
			return usage()
		}
		do = func(d slots.Desk) error { return d.Forgive(digest) }
	case "recover":
		if reason == "" {
			return usage()
		}
		do = func(d slots.Desk) error { return d.Recover(reason, restart) }
	case "trial":
		if len(rest) > 0 {
			return usage()
		}
		do = trial
	default:
		return usage()
	}
	b, err := openBox(runDir)
	if err == nil {
		err = do(b.desk())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node slot %s: %v\n", args[0], err)
		return 1
	}
	return 0
}

var slotNames = map[string]firmware.SlotID{"a": firmware.SlotA, "b": firmware.SlotB}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

func restart() error { return metal.Loader{}.Restart(context.Background(), "a person asked for it") }

func listSlots(d slots.Desk, asJSON bool) error {
	l, err := d.List()
	if err != nil {
		return err
	}
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(l)
	}
	fmt.Print(slotText(l))
	return nil
}

// slotText is a listing for a person.
func slotText(l slots.Listing) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-5s %-8s %-20s %-8s %s\n", "SLOT", "STATE", "VERSION", "RUNNING", "BOOT FILE")
	for _, r := range l.Slots {
		runs := ""
		if r.Running {
			runs = "yes"
		}
		version := "-"
		if r.Version != "" {
			version = text.Clean(r.Name+" "+r.Version, 40)
		}
		fmt.Fprintf(&b, "%-5s %-8s %-20s %-8s %s\n", r.ID, r.State, version, runs, text.Clean(r.File, 80))
		if r.Reason != "" {
			fmt.Fprintf(&b, "      bad: %s\n", text.Clean(r.Reason, 300))
		}
	}
	fmt.Fprintf(&b, "The next start takes %s.\n", orNothing(l.Next))
	if l.Recovery != "" {
		fmt.Fprintf(&b, "Recovery was asked for: %s\n", text.Clean(l.Recovery, 300))
	}
	for _, f := range l.Failed {
		fmt.Fprintf(&b, "Version %s failed here and is not tried again: %s (image %s)\n", text.Clean(f.Version, 40), text.Clean(f.Reason, 300), f.Image)
	}
	return b.String()
}

func orNothing(s string) string {
	if s == "" {
		return "nothing of this disk"
	}
	return text.Clean(s, 80)
}

// Trial: a new system whose agent never comes up, or dies again and again, can
// be judged by nobody. A timer asks; an agent that lives from one question to
// the next is left alone, whatever it says: it judges at once when it starts.
const (
	trialAsks  = 4
	trialPause = 20 * time.Second
)

func trial(d slots.Desk) error {
	l, err := d.List()
	if err != nil {
		return err
	}
	onTrial := false
	for _, r := range l.Slots {
		onTrial = onTrial || r.Running && (r.State == firmware.SlotStaged || r.State == firmware.SlotTrying)
	}
	if !onTrial {
		return nil
	}
	if lives(func() (int, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return local.Process(ctx, filepath.Join(runDir, local.SocketName))
	}, func() { time.Sleep(trialPause) }) {
		return nil
	}
	fmt.Println("The new system is on trial, and its node agent does not live: restarting.")
	return restart()
}

// lives reports whether one process answers twice running.
func lives(ask func() (pid int, err error), pause func()) bool {
	last := 0
	for i := range trialAsks {
		if i > 0 {
			pause()
		}
		pid, err := ask()
		if err == nil && pid == last {
			return true
		}
		last = 0
		if err == nil {
			last = pid
		}
	}
	return false
}
