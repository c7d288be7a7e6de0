package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
)

// eventful is a centre with one site, whose streams the test writes.
type eventful struct {
	musterv1connect.UnimplementedManagementServiceHandler
	// streams are what each following call sends, and how it ends.
	streams []func(send func(*musterv1.WatchEventsResponse)) error
	afters  []uint64
	gone    bool
}

func (c *eventful) WatchEvents(_ context.Context, q *musterv1.WatchEventsRequest, out *connect.ServerStream[musterv1.WatchEventsResponse]) error {
	var sent error
	send := func(m *musterv1.WatchEventsResponse) { sent = errors.Join(sent, out.Send(m)) }
	if !q.Follow {
		send(event(3, "shop-7"))
		return sent
	}
	c.afters = append(c.afters, q.After)
	if len(c.streams) == 0 {
		return connect.NewError(connect.CodePermissionDenied, errors.New("the test is over"))
	}
	next := c.streams[0]
	c.streams = c.streams[1:]
	return errors.Join(next(send), sent)
}

func event(seq uint64, site string) *musterv1.WatchEventsResponse {
	return &musterv1.WatchEventsResponse{Event: &musterv1.Event{Tenant: "default", Seq: seq, Time: timestamppb.New(time.Unix(1, 0)), Kind: "site.changed", Site: site, Text: "it changed"}}
}

func (c *eventful) site() *musterv1.Site {
	return &musterv1.Site{Meta: &musterv1.Meta{Tenant: "default", Name: "shop-7"}}
}

func (c *eventful) ListSites(context.Context, *musterv1.ListSitesRequest) (*musterv1.ListSitesResponse, error) {
	return &musterv1.ListSitesResponse{Sites: []*musterv1.Site{c.site()}}, nil
}

func (c *eventful) GetSite(_ context.Context, q *musterv1.GetSiteRequest) (*musterv1.GetSiteResponse, error) {
	if q.Name != "shop-7" || c.gone {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("none"))
	}
	return &musterv1.GetSiteResponse{Site: c.site()}, nil
}

// TestWatchGoesOn: a stream that breaks goes on after the last event; one that
// cannot begins anew with a list, and says so.
func TestWatchGoesOn(t *testing.T) {
	away := connect.NewError(connect.CodeUnavailable, errors.New("the centre stops"))
	c := &eventful{streams: []func(func(*musterv1.WatchEventsResponse)) error{
		func(send func(*musterv1.WatchEventsResponse)) error {
			send(&musterv1.WatchEventsResponse{}) // it is there
			send(event(4, "shop-7"))
			send(event(5, "")) // of nothing that is watched
			return away
		},
		func(send func(*musterv1.WatchEventsResponse)) error {
			send(event(6, "shop-7"))
			send(event(7, "shop-8"))
			return away
		},
		func(send func(*musterv1.WatchEventsResponse)) error {
			send(&musterv1.WatchEventsResponse{Gap: "too long ago"})
			return nil
		},
	}}
	_, handler := musterv1connect.NewManagementServiceHandler(c)
	srv := httptest.NewServer(handler)
	defer srv.Close()
	var out, errs bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetContext(context.Background())
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	w := watcher{
		cmd: cmd, f: "json", kinds: []string{"site"}, pause: time.Nanosecond,
		c: &centre{ManagementServiceClient: musterv1connect.NewManagementServiceClient(srv.Client(), srv.URL)},
	}
	if err := w.run(); err == nil || !strings.Contains(err.Error(), "the test is over") {
		t.Errorf("%v", err)
	}
	var got []string
	for d := json.NewDecoder(&out); d.More(); {
		var l watched
		if err := d.Decode(&l); err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.Join([]string{l.Type, l.Name}, " "))
		if l.Type == watchChanged && l.Object == nil || l.Type == watchGone && l.Object != nil {
			t.Errorf("%+v", l)
		}
	}
	want := []string{"listed shop-7", "synced ", "changed shop-7", "changed shop-7", "gone shop-8", "restarted ", "listed shop-7", "synced "}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if !slices.Equal(c.afters, []uint64{3, 5, 7, 3}) {
		t.Errorf("it went on after %v", c.afters)
	}
	if !strings.Contains(errs.String(), "the centre is away") || !strings.Contains(errs.String(), "starting anew with a full list: too long ago") {
		t.Errorf("%s", errs.String())
	}
	// So many lines, and no more.
	out.Reset()
	w = watcher{cmd: cmd, f: "name", kinds: []string{"site"}, c: w.c, left: 1}
	if err := w.run(); err != nil || out.String() != "site/shop-7\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}
