package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/agent/journal"
	"github.com/muster-edge/muster/agent/member"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// check is `muster-node agent --check`: what the agent would find here. It
// changes nothing. Its exit code is 1 if the agent could not work.
func check(ctx context.Context, o agentOptions) int {
	bad := 0
	say := func(what string, err error, found string) {
		mark := "ok  "
		if err != nil {
			mark, found = "BAD ", err.Error()
			bad++
		}
		fmt.Printf("%s %-14s %s\n", mark, what, found)
	}
	site, err := o.readSite()
	say("site.json", err, fmt.Sprintf("image %s@%s, centre %s", site.Image, site.Version, strings.Join(site.Centre, " ")))
	if err == nil {
		keys, err := statement.ParseKeys([]byte(site.OrdersKeysPEM))
		say("orders keys", err, fmt.Sprint(len(keys)))
	}
	d, err := device.Open(strings.TrimPrefix(o.tpm, "unix:"))
	if err != nil {
		say("TPM", err, "")
	} else {
		defer d.Close()
		id, err := nodeIDOf(ctx, d)
		say("node", err, string(id)+"  "+words(id, err))
		mark, err := d.Mark()
		if mark == "" {
			mark = "none: this machine was in no cluster"
		}
		say("TPM mark", err, mark)
	}
	log, err := o.readEventLog()
	say("event log", err, fmt.Sprintf("%d bytes", len(log)))
	in, err := journal.Peek(filepath.Join(o.paths.State, "journal"))
	say("journal", err, in)
	say("k3s", k3sVersion(ctx, o.k3s), o.k3s)
	ln, err := net.Listen("tcp", o.listen)
	if err == nil {
		_ = ln.Close()
	}
	say("listen", err, o.listen)
	own := member.OwnAddress(o.link)
	err = nil
	if !own.IsValid() {
		err = fmt.Errorf("no LAN address on interface %q", o.link)
	}
	say("LAN address", err, own.String())
	if o.control == "systemd" {
		_, err := os.Stat("/run/systemd/system")
		say("systemd", err, "runs")
	}
	if bad > 0 {
		return 1
	}
	return 0
}

func words(id fleet.NodeID, err error) string {
	if err != nil {
		return ""
	}
	return fleet.Words(id)
}

func k3sVersion(ctx context.Context, program string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, program, "--version")
	c.WaitDelay = time.Second
	if err := c.Run(); err != nil {
		return fmt.Errorf("%s --version: %w", program, err)
	}
	return nil
}
