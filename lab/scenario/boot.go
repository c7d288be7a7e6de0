package scenario

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/server"
)

// prepareBoot builds an image like any other; its centre is never started.
func prepareBoot(ctx context.Context, l *lab.Lab) error {
	if l.Spec.Image != "" {
		return buildImage(ctx, l)
	}
	return prepareEnroll(ctx, l)
}

// runBoot: given machines and a boot host, when they are powered on, then
// each runs the recovery image's /init.
func runBoot(ctx context.Context, l *lab.Lab) error {
	if err := l.ChooseAccel(ctx, imageFile(l)); err != nil {
		return err
	}
	if err := startForeign(l); err != nil {
		return err
	}
	host, err := startBootHost(ctx, l, imageDir(l), "boot host")
	if err != nil {
		return err
	}
	machines, err := addMachines(l, imageFile(l))
	if err != nil {
		return err
	}
	return l.Check("every machine runs the recovery image", forEach(ctx, machines, func(ctx context.Context, m *machine.Machine) error {
		if err := l.PowerOn(ctx, m); err != nil {
			return err
		}
		return host.during(ctx, func(ctx context.Context) error { return waitInit(ctx, l, m) })
	}))
}

// startForeign starts the site's own DHCP server where the spec wants one.
func startForeign(l *lab.Lab) error {
	if l.Spec.DHCP != lab.DHCPProxy {
		return nil
	}
	_, err := l.StartForeignDHCP()
	return err
}

// bootHost is network boot inside the lab's own process: the honest one of
// the scenario boot, and the dishonest one of forged images.
type bootHost struct {
	ended context.Context // its cause says why the server ended
}

// startBootHost serves the image in dir to every machine that asks.
func startBootHost(ctx context.Context, l *lab.Lab, dir, source string) (*bootHost, error) {
	mode, err := pxe.ParseMode(l.Spec.DHCP)
	if err != nil {
		return nil, err
	}
	state := l.Path("boot-host")
	if err := os.MkdirAll(state, 0o755); err != nil {
		return nil, fmt.Errorf("scenario: start boot host: %w", err)
	}
	logFile, err := os.OpenFile(l.Path("boot-host.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("scenario: start boot host: %w", err)
	}
	l.Defer(logFile.Close)
	from, to := netip.MustParseAddr(lab.LeaseFrom), netip.MustParseAddr(lab.LeaseTo)
	srv, err := server.New(server.Config{
		Interface: lab.Bridge, Mode: mode, Address: netip.MustParseAddr(lab.BootHost),
		Range: server.Range{From: from, To: to}, HTTPAddr: lab.BootHost + ":7480", StateDir: state,
		Images: server.Dir(dir),
		Policy: server.PolicyFunc(func(context.Context, pxe.Machine) server.Decision {
			return server.Decision{Standing: pxe.Unknown, Reason: "the lab serves every machine"}
		}),
		Events: bootEvents{l, source},
		Log:    slog.New(slog.NewTextHandler(logFile, nil)),
	})
	if err != nil {
		return nil, fmt.Errorf("scenario: start boot host: %w", err)
	}
	if mode == pxe.ModeProxy {
		srv.OpenWindow(time.Now().Add(24*time.Hour), 1000)
	}
	runCtx, stop := context.WithCancel(ctx)
	ended, end := context.WithCancelCause(context.Background())
	go func() {
		err := srv.Run(runCtx)
		if err == nil {
			err = errors.New("scenario: the boot host ended")
		}
		end(err)
	}()
	l.Defer(func() error {
		stop()
		<-ended.Done()
		return nil
	})
	return &bootHost{ended}, nil
}

// during runs f and stops it, with the reason, when the boot host ends.
func (h *bootHost) during(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(h.ended, func() { cancel(context.Cause(h.ended)) })
	defer stop()
	err := f(ctx)
	if cause := context.Cause(ctx); err != nil && cause != nil && h.ended.Err() != nil {
		return fmt.Errorf("%w (%w)", err, cause)
	}
	return err
}

// bootEvents puts the boot host's events on the time line.
type bootEvents struct {
	l      *lab.Lab
	source string
}

func (b bootEvents) Event(e pxe.Event) {
	text := e.Text
	if e.MAC != (pxe.MAC{}) {
		text = e.MAC.String() + " " + text
	}
	if e.Alarm {
		b.l.Say(b.source, "alarm", text)
		return
	}
	b.l.Note(b.source, e.Step.String(), text)
}
