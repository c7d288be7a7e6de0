package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/muster-edge/muster/lab/machine"
)

// listen serves the run's control socket. A unix socket is found by its path,
// so it works across network namespaces. down is called for the op "down".
func (l *Lab) listen(down func()) (io.Closer, error) {
	path := l.Path(controlFile)
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("lab: listen for control: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: listen for control: %w", err), ln.Close())
	}
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			// One at a time: this is for a person at a terminal.
			l.serve(conn, down)
		}
	}()
	return ln, nil
}

func (l *Lab) serve(conn net.Conn, down func()) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	var req Request
	if err := json.NewDecoder(io.LimitReader(conn, maxControl)).Decode(&req); err != nil {
		return
	}
	a := Answer{OK: true}
	if err := l.obey(req, &a, down); err != nil {
		a = Answer{Error: err.Error()}
	}
	_ = json.NewEncoder(conn).Encode(a)
}

func (l *Lab) obey(req Request, a *Answer, down func()) error {
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	switch req.Op {
	case "status":
		l.mu.Lock()
		a.Phase = l.phase
		l.mu.Unlock()
		for _, m := range l.Machines() {
			_, on := m.On()
			s := MachineStatus{Name: m.Name(), On: on, MAC: m.MAC()}
			if t := m.Serial().Tail(1); len(t) == 1 {
				s.Last = t[0].Text
			}
			a.Machines = append(a.Machines, s)
		}
		return nil
	case "down":
		down()
		return nil
	case "power-on", "power-off", "reset":
		m, err := l.machine(req.Machine)
		if err != nil {
			return err
		}
		l.Say(m.Name(), req.Op, req.Op+" (asked for by a person)")
		switch req.Op {
		case "power-on":
			return m.PowerOn(ctx)
		case "power-off":
			return m.PowerOff(ctx)
		}
		return m.Reset(ctx)
	}
	return fmt.Errorf("lab: no operation %q", req.Op)
}

func (l *Lab) machine(name string) (*machine.Machine, error) {
	for _, m := range l.Machines() {
		if m.Name() == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("lab: no machine %q", name)
}
