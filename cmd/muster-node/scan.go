package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/facts"
	"github.com/muster-edge/muster/agent/recovery"
	"github.com/muster-edge/muster/agent/recovery/stick"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// stickModules: the kernel would ask a program in user space for them, and
// there is none. Hosts and sticks are found by modalias.
var stickModules = []string{"nls_cp437", "nls_ascii", "vfat", "sd_mod"}

// scanMachine is what an image built with --mode scan does.
func scanMachine(ctx context.Context, s recovery.ScanServices) error {
	select {
	case <-s.Booted:
	case <-ctx.Done():
		return ctx.Err()
	}
	id, err := readTPM(ctx)
	if err != nil {
		return err
	}
	s.Identity(id)
	for _, m := range stickModules {
		if err := s.Module(m); err != nil {
			s.Log.Info("module", "name", m, "err", err) // it may be built in
		}
	}
	return stick.Run(ctx, stick.Config{
		Entry:     stick.EntryOf(id.EK, s.Site.Scan.Site, s.Hardware()),
		Words:     id.Words,
		Partition: func() string { return facts.BootPartition(os.DirFS("/")) },
		Say:       func(state agent.State, text string) { s.Progress(recovery.Progress{State: state, Text: text}) },
	})
}

func readTPM(ctx context.Context) (recovery.Identity, error) {
	d, err := device.Open(tpmPath)
	if errors.Is(err, device.ErrNoTPM) {
		return recovery.Identity{}, errors.New(recovery.NoTPM)
	}
	if err != nil {
		return recovery.Identity{}, err
	}
	id, err := identityOf(ctx, d)
	if cerr := d.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close TPM: %w", cerr)
	}
	return id, err
}
