// Package proc is what every part needs from the process: log lines in the
// form of k3s, the two ways to end (status 1 for a fatal error, status 0 when
// something asked for a shutdown), the process title and sd_notify.
package proc

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"k8s.io/klog/v2"
)

// Version is the stand-in's version; it can never be taken for a release.
const Version = "v1.36.3+k3s0-standin"

// Header marks every answer of the supervisor.
const Header = "X-K3s-Standin"

var mu sync.Mutex // one line at a time

func line(level, format string, a ...any) {
	mu.Lock()
	defer mu.Unlock()
	fmt.Fprintf(os.Stderr, "time=%q level=%s msg=%s\n", time.Now().UTC().Format(time.RFC3339), level, strconv.Quote(fmt.Sprintf(format, a...)))
}

// Info, Warn and Error write one line.
func Info(format string, a ...any)  { line("info", format, a...) }
func Warn(format string, a ...any)  { line("warning", format, a...) }
func Error(format string, a ...any) { line("error", format, a...) }

// Fatal writes one line and ends with status 1.
func Fatal(format string, a ...any) {
	line("fatal", format, a...)
	os.Exit(1)
}

// NoLog takes what nobody reads, such as failed TLS handshakes.
var NoLog = log.New(io.Discard, "", 0)

// Quiet lets only the errors of the Kubernetes libraries through.
func Quiet() {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	_ = fs.Set("logtostderr", "false")
	_ = fs.Set("stderrthreshold", "ERROR")
	klog.SetOutput(io.Discard)
}

// ErrShutdown is the cause of a context that RequestShutdown ended.
var ErrShutdown = errors.New("shutdown requested")

// Shutdown ends a run: with k3s most failures at run time take this way and so
// end with status 0.
type Shutdown struct{ cancel context.CancelCauseFunc }

// NewShutdown wraps a context.
func NewShutdown(ctx context.Context) (context.Context, *Shutdown) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &Shutdown{cancel}
}

// Request ends the run because of err.
func (s *Shutdown) Request(err error) {
	Error("Shutdown request received: %v", err)
	s.cancel(ErrShutdown)
}

// Title overwrites the arguments that other processes see: like k3s, no
// argument and so no secret stays in the process list.
func Title(title string) {
	if len(os.Args) == 0 || len(os.Args[0]) == 0 {
		return
	}
	shown := os.Args
	os.Args = make([]string, len(shown))
	for i, a := range shown {
		os.Args[i] = strings.Clone(a) // libraries look at their own name
	}
	first := true
	for _, a := range shown {
		if len(a) == 0 {
			continue
		}
		b := unsafe.Slice(unsafe.StringData(a), len(a))
		for i := range b {
			b[i] = 0
		}
		if first {
			copy(b, title)
			first = false
		}
	}
}

// notifySocket is taken out of the environment at once: the apiserver in this
// process would say READY=1 on its own, too early, and forget the socket.
var notifySocket = func() string {
	s := os.Getenv("NOTIFY_SOCKET")
	_ = os.Unsetenv("NOTIFY_SOCKET")
	return s
}()

// Notify sends a state to the service manager, if there is one.
func Notify(state string) {
	path := notifySocket
	if path == "" {
		return
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}

// Sleep waits for d or until ctx ends; it tells whether d has passed.
func Sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
