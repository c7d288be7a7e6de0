package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// eventsCommand is `muster events`.
func eventsCommand() *cobra.Command {
	var (
		follow bool
		tail   uint32
		after  uint64
		f      format
	)
	cmd := &cobra.Command{
		Use:   "events [-f]",
		Short: "Show what happens: machines that boot, requests, decisions, certificates",
		Long: `Shows the newest events, and with -f those to come. Events are for watching and
the oldest are dropped; what must be kept is in ` + "`muster audit`" + `.`,
		Args: noArgs,
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "stay, and show events as they come")
	cmd.Flags().Uint32Var(&tail, "tail", 100, "show so many of the newest first, at most 1000")
	cmd.Flags().Uint64Var(&after, "after", 0, "show events with a higher number than this")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		if after > 0 {
			tail = 0
		}
		for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
			last, err := watch(cmd, c, f, after, tail, follow)
			if last > after {
				after, tail, wait = last, 0, time.Second
			}
			broken := connect.CodeOf(err) == connect.CodeUnavailable || errors.Is(err, io.ErrUnexpectedEOF)
			switch {
			case cmd.Context().Err() != nil:
				return nil
			case !follow || err != nil && (!broken || last == 0 && after == 0):
				if err == nil && last == 0 {
					fmt.Fprintln(cmd.ErrOrStderr(), "no events")
				}
				return c.explain(err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "the centre is away; trying again in %s\n", wait)
			select {
			case <-time.After(wait):
			case <-cmd.Context().Done():
				return nil
			}
		}
	}
	return cmd
}

func watch(cmd *cobra.Command, c *centre, f format, after uint64, tail uint32, follow bool) (last uint64, err error) {
	stream, err := c.WatchEvents(cmd.Context(), &musterv1.WatchEventsRequest{After: after, Tail: tail, Follow: follow})
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	for stream.Receive() {
		if gap := stream.Msg().Gap; gap != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "events are missing: %s\n", cell(gap))
		}
		m := stream.Msg().Event
		if m == nil {
			continue
		}
		e, err := api.EventFromProto(m)
		if err != nil {
			return last, err
		}
		last = e.Seq
		if err := writeEvent(cmd.OutOrStdout(), f, e); err != nil {
			return last, err
		}
	}
	if err := stream.Err(); err != nil && !errors.Is(err, context.Canceled) {
		return last, err
	}
	return last, nil
}

func writeEvent(w io.Writer, f format, e fleet.Event) error {
	switch f {
	case "json":
		return writeJSONLine(w, e)
	case "yaml":
		fmt.Fprintln(w, "---")
		return writeYAML(w, e)
	case "name":
		_, err := fmt.Fprintf(w, "event/%d\n", e.Seq)
		return err
	}
	who := e.MAC
	if who == "" {
		who = string(e.Node)
	}
	if who == "" {
		who = "-"
	}
	level := ""
	if e.Level > fleet.EventInfo {
		level = strings.ToUpper(e.Level.String()) + " "
	}
	line := fmt.Sprintf("%s  %-26s %-20s %s%s", e.Time.Local().Format("2006-01-02 15:04:05"), cell(who), cell(e.Kind), level, cell(e.Text))
	if f == "wide" {
		line += fmt.Sprintf("  [%d %s %s %s]", e.Seq, e.Node, e.Request, cell(labels(e.Fields)))
	}
	_, err := fmt.Fprintln(w, line)
	return err
}
