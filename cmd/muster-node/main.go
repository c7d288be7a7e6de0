// Command muster-node is what runs on nodes. As PID 1 of the recovery image
// it is /init; otherwise it has small sub-commands for looking at a machine.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/recovery"
)

// version and buildTime (RFC 3339) are set by the Makefile.
var (
	version   = "0.0.0-dev"
	buildTime = ""
)

const usage = `usage: muster-node COMMAND
  version           print the version
  facts [-o json]   print what this machine says of its hardware
  agent [flags]     be a member of the site: find peers, form the cluster, heal it
  status [-o json]  what this node does, why it waits, whom it sees
  slot COMMAND      the two slots of this disk: list, rollback, mark-bad, forgive, recover
  data [COMMAND]    make, unlock and mount the data partition
  k3s [flags]       run k3s as the role file says (started by the node agent)
As PID 1 (or started as /init) it is the init of the recovery image and of a slot's initrd.`

func main() {
	if os.Getpid() == 1 || os.Args[0] == "/init" {
		startSlot()
		recovery.Run(recovery.Config{Version: version, BuildTime: built(), Open: openEnroller, Scan: scanMachine, Why: whyHere})
		return
	}
	os.Exit(run(os.Args[1:]))
}

// run is main with an exit code: 0 held, 1 failed, 2 usage.
func run(args []string) int {
	switch {
	case len(args) == 1 && args[0] == "version":
		fmt.Println(version)
		return 0
	case len(args) > 0 && args[0] == "facts" && (len(args) == 1 || len(args) == 3 && args[1] == "-o" && args[2] == "json"):
		return printFacts()
	case len(args) > 0 && args[0] == "agent":
		return runAgent(args[1:])
	case len(args) > 0 && args[0] == "status":
		return status(args[1:])
	case len(args) > 0 && args[0] == "slot":
		return slotCommand(args[1:])
	case len(args) > 0 && args[0] == "data":
		return dataCommand(args[1:])
	case len(args) > 0 && args[0] == "k3s":
		return launchK3s(args[1:])
	case len(args) > 0 && args[0] == "k3s-child":
		return becomeK3s(args[1:])
	}
	fmt.Fprintln(os.Stderr, usage)
	return 2
}

func printFacts() int {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	if err := e.Encode(facts.Read(os.DirFS("/"))); err != nil {
		fmt.Fprintf(os.Stderr, "muster-node: print facts: %v\n", err)
		return 1
	}
	return 0
}

// built is the time this program was made, for the time floor: the linker's
// word, else that of the commit.
func built() time.Time {
	if t, err := time.Parse(time.RFC3339, buildTime); err == nil {
		return t
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			if t, err := time.Parse(time.RFC3339, s.Value); err == nil {
				return t
			}
		}
	}
	return time.Time{}
}
