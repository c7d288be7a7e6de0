package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/muster-edge/muster/api"
	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
)

// watchKinds are the kinds of objects that events tell about.
var watchKinds = []string{"site", "node", "request"}

// Types of what muster watch prints.
const (
	watchListed    = "listed"
	watchSynced    = "synced"
	watchChanged   = "changed"
	watchGone      = "gone"
	watchRestarted = "restarted"
)

// watched is one line of muster watch -o json.
type watched struct {
	Type string `json:"type"`
	// Seq is the number to go on after with --after.
	Seq    uint64 `json:"seq"`
	Kind   string `json:"kind,omitempty"`
	Name   string `json:"name,omitempty"`
	Object any    `json:"object,omitempty"`
	// Why is the event that told of a change, or why it starts anew.
	Why string `json:"why,omitempty"`
}

// watchCommand is `muster watch [KIND...]`.
func watchCommand() *cobra.Command {
	var (
		after uint64
		lines int
		f     format
	)
	cmd := &cobra.Command{
		Use:   "watch [site|node|request]...",
		Short: "List objects, and then each that changes",
		Long: `Prints all objects, "synced", and from then on each object that something
happened to, as it is then. When the connection is lost, or the centre starts
anew, it goes on where it was. What has gone too far meanwhile (the centre keeps
the last 20,000 events) starts anew with a full list, and says so: "restarted".

-o json prints JSON Lines. Each has the number with which --after goes on.`,
		Example: `  muster watch site
  muster watch node -o json --after 4711`,
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().IntVar(&lines, "count", 0, "end after so many lines; 0: never")
	cmd.Flags().Uint64Var(&after, "after", 0, "go on after this number, without a list")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		w := watcher{cmd: cmd, f: f, cursor: after, synced: after > 0, left: lines, pause: time.Second}
		for _, k := range args {
			k = strings.TrimSuffix(k, "s")
			if !slices.Contains(watchKinds, k) {
				return exitError{2, fmt.Errorf("%q is none of %s", k, strings.Join(watchKinds, ", "))}
			}
			w.kinds = append(w.kinds, k)
		}
		if len(w.kinds) == 0 {
			w.kinds = watchKinds
		}
		var err error
		if w.c, err = a.connect(); err != nil {
			return err
		}
		return w.run()
	}
	return cmd
}

type watcher struct {
	cmd   *cobra.Command
	c     *centre
	f     format
	kinds []string
	// cursor is the number of the last event that was dealt with; synced: the
	// list before it was printed.
	cursor uint64
	synced bool
	// left is how many lines are still wanted; 0: all.
	left int
	// pause is the first wait before trying again.
	pause time.Duration
	// reached: the centre was spoken to at least once.
	reached bool
}

func (w *watcher) run() error {
	ctx := w.cmd.Context()
	for wait := w.pause; ; wait = min(2*wait, 30*time.Second) {
		before := w.cursor
		err := w.once(ctx)
		if ctx.Err() != nil || errors.Is(err, errEnough) {
			return nil
		}
		broken := err == nil || connect.CodeOf(err) == connect.CodeUnavailable || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
		if !broken || !w.reached {
			return w.c.explain(err)
		}
		if w.cursor > before {
			wait = w.pause
		}
		fmt.Fprintf(w.cmd.ErrOrStderr(), "the centre is away; trying again in %s\n", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// errGap ends a stream that cannot go on where it was.
var errGap = errors.New("events are missing")

// errEnough ends a watch that was for so many lines.
var errEnough = errors.New("enough")

// once lists, if that was not done yet, and follows until the stream ends.
func (w *watcher) once(ctx context.Context) error {
	for {
		if !w.synced {
			if err := w.list(ctx); err != nil {
				return err
			}
		}
		if err := w.follow(ctx); !errors.Is(err, errGap) {
			return err
		}
	}
}

// list prints all objects. The number is taken before: what changes while it
// lists is told of again.
func (w *watcher) list(ctx context.Context) error {
	last, err := w.last(ctx)
	if err != nil {
		return err
	}
	w.reached = true
	for _, k := range w.kinds {
		if err := w.listKind(ctx, k, last); err != nil {
			return err
		}
	}
	w.cursor, w.synced = last, true
	return w.say(watched{Type: watchSynced, Seq: last})
}

func (w *watcher) last(ctx context.Context) (last uint64, err error) {
	stream, err := w.c.WatchEvents(ctx, &musterv1.WatchEventsRequest{Tail: 1})
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	for stream.Receive() {
		if e := stream.Msg().Event; e != nil {
			last = e.Seq
		}
	}
	return last, stream.Err()
}

func (w *watcher) listKind(ctx context.Context, kind string, seq uint64) error {
	listed := func(name string, object any) error {
		return w.say(watched{Type: watchListed, Seq: seq, Kind: kind, Name: name, Object: object})
	}
	for after := ""; ; {
		more := false
		switch kind {
		case "site":
			out, err := w.c.ListSites(ctx, &musterv1.ListSitesRequest{After: after})
			if err != nil {
				return err
			}
			for _, m := range out.Sites {
				s, err := api.SiteFromProto(m)
				if err := errors.Join(err, listed(s.Name, s)); err != nil {
					return err
				}
				after = s.Name
			}
			more = out.More
		case "node":
			out, err := w.c.ListNodes(ctx, &musterv1.ListNodesRequest{After: after})
			if err != nil {
				return err
			}
			for _, m := range out.Nodes {
				n, err := api.NodeFromProto(m)
				if err := errors.Join(err, listed(string(n.ID), n)); err != nil {
					return err
				}
				after = string(n.ID)
			}
			more = out.More
		case "request":
			out, err := w.c.ListRequests(ctx, &musterv1.ListRequestsRequest{After: after})
			if err != nil {
				return err
			}
			for _, m := range out.Requests {
				r, err := api.RequestFromProto(m)
				if err := errors.Join(err, listed(string(r.ID), r)); err != nil {
					return err
				}
				after = string(r.ID)
			}
			more = out.More
		}
		if !more {
			return nil
		}
	}
}

func (w *watcher) follow(ctx context.Context) error {
	stream, err := w.c.WatchEvents(ctx, &musterv1.WatchEventsRequest{After: w.cursor, Follow: true})
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		w.reached = true
		m := stream.Msg()
		if m.Gap != "" {
			w.synced = false
			fmt.Fprintf(w.cmd.ErrOrStderr(), "starting anew with a full list: %s\n", cell(m.Gap))
			if err := w.say(watched{Type: watchRestarted, Seq: w.cursor, Why: m.Gap}); err != nil {
				return err
			}
			return errGap
		}
		if m.Event == nil {
			continue
		}
		e, err := api.EventFromProto(m.Event)
		if err != nil {
			return err
		}
		if err := w.event(ctx, e); err != nil {
			return err
		}
		w.cursor = e.Seq
	}
	return stream.Err()
}

// event prints the objects that an event is about, as they are now.
func (w *watcher) event(ctx context.Context, e fleet.Event) error {
	for _, k := range w.kinds {
		name := map[string]string{"site": e.Site, "node": string(e.Node), "request": string(e.Request)}[k]
		if e.Kind == "site.deleted" && k == "site" {
			name = e.Fields["site"]
		}
		if name == "" {
			continue
		}
		object, err := w.object(ctx, k, name)
		line := watched{Type: watchChanged, Seq: e.Seq, Kind: k, Name: name, Object: object, Why: e.Text}
		if connect.CodeOf(err) == connect.CodeNotFound {
			if e.Kind != "site.deleted" && k != "site" {
				continue // a machine that is no node yet
			}
			line.Type, line.Object, err = watchGone, nil, nil
		}
		if err != nil {
			return err
		}
		if err := w.say(line); err != nil {
			return err
		}
	}
	return nil
}

func (w *watcher) object(ctx context.Context, kind, name string) (any, error) {
	switch kind {
	case "site":
		out, err := w.c.GetSite(ctx, &musterv1.GetSiteRequest{Name: name})
		if err != nil {
			return nil, err
		}
		return api.SiteFromProto(out.Site)
	case "node":
		out, err := w.c.GetNode(ctx, &musterv1.GetNodeRequest{Id: name})
		if err != nil {
			return nil, err
		}
		return api.NodeFromProto(out.Node)
	}
	out, err := w.c.GetRequest(ctx, &musterv1.GetRequestRequest{Id: name})
	if err != nil {
		return nil, err
	}
	return api.RequestFromProto(out.Request)
}

func (w *watcher) say(line watched) error {
	if err := w.write(line); err != nil {
		return err
	}
	if w.left > 0 {
		if w.left--; w.left == 0 {
			return errEnough
		}
	}
	return nil
}

func (w *watcher) write(line watched) error {
	out := w.cmd.OutOrStdout()
	switch w.f {
	case "json":
		return writeJSONLine(out, line)
	case "yaml":
		fmt.Fprintln(out, "---")
		return writeYAML(out, line)
	case "name":
		if line.Kind != "" {
			fmt.Fprintf(out, "%s/%s\n", line.Kind, cell(line.Name))
		}
		return nil
	}
	_, err := fmt.Fprintf(out, "%d  %-9s %-40s %s\n", line.Seq, line.Type, cell(strings.Trim(line.Kind+"/"+line.Name, "/")), cell(line.Why))
	return err
}
