package machine

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}` + "\n"

// fakeQEMU answers each command by reply (given its id), which may write what
// it likes.
func fakeQEMU(t *testing.T, hello string, reply func(w io.Writer, command string, id uint64)) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	t.Cleanup(func() { _, _ = ours.Close(), theirs.Close(); <-done })
	go func() {
		defer close(done)
		defer theirs.Close()
		if _, err := io.WriteString(theirs, hello); err != nil {
			return
		}
		r := bufio.NewScanner(theirs)
		for r.Scan() {
			var c struct {
				Execute string `json:"execute"`
				ID      uint64 `json:"id"`
			}
			if json.Unmarshal(r.Bytes(), &c) != nil {
				return
			}
			reply(theirs, c.Execute, c.ID)
		}
	}()
	return ours
}

func good(w io.Writer, _ string, id uint64) {
	_, _ = fmt.Fprintf(w, `{"return": {}, "id": %d}`+"\n", id)
}

func TestQMP(t *testing.T) {
	events := make(chan string, 10)
	conn := fakeQEMU(t, greeting, func(w io.Writer, command string, id uint64) {
		switch command {
		case "query-status":
			_, _ = fmt.Fprintf(w, `{"event": "RESET", "timestamp": {}}`+"\n"+`{"return": {"status": "running"}, "id": %d}`+"\n", id)
		case "nonsense":
			_, _ = fmt.Fprintf(w, `{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": %d}`+"\n", id)
		default:
			good(w, command, id)
		}
	})
	q, err := newQMP(t.Context(), conn, func(e Event) { events <- e.Name })
	if err != nil {
		t.Fatal(err)
	}
	got, err := q.Execute(t.Context(), "query-status", nil)
	if err != nil || !bytes.Contains(got, []byte("running")) {
		t.Fatalf("query-status: %s %v", got, err)
	}
	if e := <-events; e != "RESET" {
		t.Errorf("event %q", e)
	}
	var refused *QMPError
	if _, err := q.Execute(t.Context(), "nonsense", map[string]int{"a": 1}); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("nonsense: %v", err)
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Execute(t.Context(), "query-status", nil); err == nil {
		t.Error("command after Close: no error")
	}
}

func TestQMPWhenOtherSideMisbehavesThenError(t *testing.T) {
	for name, c := range map[string]struct {
		hello string
		reply func(io.Writer, string, uint64)
		want  string
	}{
		"no QMP":           {"SSH-2.0-x\n", good, "greeting"},
		"other JSON":       {`{"hello": 1}` + "\n", good, "not QMP"},
		"endless greeting": {strings.Repeat("x", 2*maxMessage), good, "more than"},
		"cut greeting":     {`{"QMP": {}`, func(io.Writer, string, uint64) {}, "context deadline"},
		"refused": {greeting, func(w io.Writer, _ string, id uint64) {
			_, _ = fmt.Fprintf(w, `{"error":{"class":"X","desc":"no"},"id":%d}`+"\n", id)
		}, "no (X)"},
		"other answer":   {greeting, func(w io.Writer, _ string, id uint64) { _, _ = fmt.Fprintf(w, `{"return":{},"id":%d}`+"\n", id+7) }, "context deadline"},
		"silence":        {greeting, func(io.Writer, string, uint64) {}, "context deadline"},
		"garbage":        {greeting, func(w io.Writer, _ string, _ uint64) { _, _ = io.WriteString(w, "\x00\xff{{{\n") }, "invalid character"},
		"endless answer": {greeting, func(w io.Writer, _ string, _ uint64) { _, _ = io.WriteString(w, strings.Repeat("[", 2*maxMessage)) }, "more than"},
		"deep answer":    {greeting, func(w io.Writer, _ string, _ uint64) { _, _ = io.WriteString(w, strings.Repeat("[", 100000)+"\n") }, "exceeded max depth"},
		"hang-up":        {greeting, func(w io.Writer, _ string, _ uint64) { _ = w.(io.Closer).Close() }, "ended"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			q, err := newQMP(ctx, fakeQEMU(t, c.hello, c.reply), nil)
			if err == nil {
				_ = q.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %q does not say %q", err, c.want)
			}
		})
	}
}

func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": 0}` + "\n"))
	f.Add([]byte(`{"event": "RESET"}` + "\n" + `{"error": {}, "id": 0}` + "\n"))
	f.Add([]byte(`{"error": null, "id": 0}` + "\n{}\n[]\nnull\n\n"))
	f.Fuzz(func(t *testing.T, reply []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		q, err := newQMP(ctx, fakeQEMU(t, greeting, func(w io.Writer, _ string, _ uint64) { _, _ = w.Write(reply); _ = w.(io.Closer).Close() }), func(Event) {})
		if err == nil {
			_ = q.Close()
		}
	})
}
