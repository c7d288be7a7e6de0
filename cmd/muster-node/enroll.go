package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	"github.com/muster-edge/muster/agent"
	"github.com/muster-edge/muster/agent/recovery"
	"github.com/muster-edge/muster/api/muster/v1/musterv1connect"
	"github.com/muster-edge/muster/enroll/client"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/pki/tpm"
	"github.com/muster-edge/muster/pki/tpm/device"
)

// tpmPath is the kernel's resource manager: objects of others stay theirs.
const tpmPath = "/dev/tpmrm0"

// openEnroller finds the TPM and ties it to the enrollment protocol.
func openEnroller(_ context.Context, s recovery.Services) (recovery.Enroller, error) {
	d, err := device.Open(tpmPath)
	if errors.Is(err, device.ErrNoTPM) {
		return nil, fmt.Errorf("%w: %w", recovery.ErrNoTPM, err)
	}
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Config{
		Site: s.Site, TPM: d, Hardware: func() fleet.Hardware { return withTPM(s.Hardware(), d) },
		EventLog: s.EventLog, Now: s.Now, SetTime: s.SetTime, Dial: s.Dial, Log: s.Log,
		Progress: func(p client.Progress) { s.Progress(translate(p)) },
	})
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &enroller{services: s, tpm: d, client: c}, nil
}

// withTPM adds what the TPM says of itself.
func withTPM(h fleet.Hardware, d *device.Device) fleet.Hardware {
	if vendor, model, firmware, err := d.Properties(); err == nil {
		h.TPMVendor, h.TPMModel, h.TPMFirmware = vendor, model, firmware
	}
	return h
}

// translate turns the protocol's phases into the machine's states.
func translate(p client.Progress) recovery.Progress {
	out := recovery.Progress{State: agent.Time, Text: p.Text, Request: p.Request}
	switch p.Phase {
	case client.PhaseProve:
		out.State = agent.Enrolling
	case client.PhaseWait:
		out.State = agent.WaitingForApproval
	case client.PhaseDone:
		out.State, out.Text = agent.Enrolled, ""
	}
	return out
}

// enroller is a TPM with the client that uses it.
type enroller struct {
	services recovery.Services
	tpm      *device.Device
	client   *client.Client
	identity client.Identity
}

// Identity reads the EK: node ID and words follow from it alone, so they are
// on the screen before any network is.
func (e *enroller) Identity(ctx context.Context) (recovery.Identity, error) {
	return identityOf(ctx, e.tpm)
}

func identityOf(ctx context.Context, d *device.Device) (recovery.Identity, error) {
	id, err := d.Identity(ctx)
	if err != nil {
		return recovery.Identity{}, err
	}
	if len(id.EKs) == 0 {
		return recovery.Identity{}, errors.New("the TPM has no usable endorsement key")
	}
	key, err := tpm.ParsePublic(id.EKs[0].Public)
	if err != nil {
		return recovery.Identity{}, err
	}
	ek, err := fleet.HashEK(key.Public)
	if err != nil {
		return recovery.Identity{}, err
	}
	return recovery.Identity{Node: ek.NodeID(), Words: fleet.Words(ek.NodeID()), EK: ek}, nil
}

// Enroll runs until there is a certificate.
func (e *enroller) Enroll(ctx context.Context) error {
	id, err := e.client.Enroll(ctx)
	e.identity = id
	return err
}

// Stay keeps in touch with the centre by the certificate and carries out the
// orders for this machine's disk. Without keys of those who may give orders it
// only reports.
func (e *enroller) Stay(ctx context.Context) error {
	if len(e.identity.Certificates) == 0 {
		return errors.New("the centre gave no certificate")
	}
	if e.services.Site.OrdersKeysPEM != "" && e.services.Site.ReleaseKeysPEM != "" {
		return e.obey(ctx)
	}
	leaf, err := x509.ParseCertificate(e.identity.Certificates[0])
	if err != nil {
		return fmt.Errorf("read the certificate: %w", err)
	}
	centres, hangUp := e.centres()
	r := recovery.Reporter{
		Centres: centres, Leaf: leaf, Image: e.services.Site.Image + "@" + e.services.Site.Version, Renew: e.renew,
		Hardware: e.services.Hardware, Now: e.services.Now, HangUp: hangUp, Log: e.services.Log,
		Heard: func(answered bool) {
			p := recovery.Progress{State: agent.Enrolled, Request: e.identity.Request}
			if !answered {
				p.Text = "the centre does not answer at the moment"
			}
			e.services.Progress(p)
		},
	}
	return r.Run(ctx)
}

// centres are the centre's URLs, called by the certificate of the moment; the
// one that enrolled the machine comes first.
func (e *enroller) centres() (centres []recovery.Centre, hangUp func()) {
	hc := e.client.NodeHTTPClient(e.identity)
	urls := append([]string{e.identity.Centre}, e.services.Site.Centre...)
	for i, u := range urls {
		if u != "" && slices.Index(urls, u) == i {
			centres = append(centres, musterv1connect.NewNodeServiceClient(hc, u, connect.WithReadMaxBytes(64<<10)))
		}
	}
	return centres, hc.CloseIdleConnections
}

// renew gets a new certificate by the old one.
func (e *enroller) renew(ctx context.Context) (recovery.Renewed, error) {
	id, err := e.client.Renew(ctx, e.identity)
	if errors.Is(err, client.ErrEnroll) {
		return recovery.Renewed{}, fmt.Errorf("%w: %w", recovery.ErrNotANode, err)
	}
	if err != nil {
		return recovery.Renewed{}, err
	}
	leaf, err := x509.ParseCertificate(id.Certificates[0]) // Renew looked at it
	if err != nil {
		return recovery.Renewed{}, fmt.Errorf("read the certificate: %w", err)
	}
	e.identity = id
	centres, hangUp := e.centres()
	return recovery.Renewed{Leaf: leaf, Centres: centres, HangUp: hangUp}, nil
}

// Close gives the TPM back.
func (e *enroller) Close() error { return e.tpm.Close() }
