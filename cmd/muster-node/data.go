package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/muster-edge/muster/agent/data"
	"github.com/muster-edge/muster/agent/install"
	"github.com/muster-edge/muster/agent/papers"
	"github.com/muster-edge/muster/agent/slots/metal"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/efi"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/statement"
	"github.com/muster-edge/muster/pki/tpm/device"
)

const dataUsage = `usage: muster-node data [COMMAND]
  (none)            make, unlock and mount the data partition; take over what recovery left
  status [-o json]  how it is
  unlock            open it with the recovery key, read from standard input, and seal it to this TPM`

const (
	dataMapped = "muster-data"
	dataAt     = "/var/lib/muster"
	siteFile   = "/etc/muster/site.json"
	// patience is how long a person at the box has to unlock what the TPM does
	// not, before the machine goes into recovery, where it can be helped from
	// afar.
	patience = 10 * time.Minute
)

func dataReport() string { return filepath.Join(runDir, "data.json") }

// dataCommand is `muster-node data`.
func dataCommand(args []string) int {
	ctx := context.Background()
	var err error
	switch {
	case len(args) == 0:
		err = openData(ctx)
	case args[0] == "unlock" && len(args) == 1:
		err = unlockData(ctx)
	case args[0] == "status" && (len(args) == 1 || len(args) == 3 && args[1] == "-o" && args[2] == "json"):
		err = dataStatus(len(args) == 3)
	default:
		fmt.Fprintln(os.Stderr, dataUsage)
		return 2
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "muster-node data: %v\n", err)
		return 1
	}
	return 0
}

func dataStatus(asJSON bool) error {
	r, err := data.ReadReport(dataReport())
	if err != nil {
		return err
	}
	if asJSON {
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	fmt.Printf("%s (state %s, recovery key %s)\n%s\n", r.Reason, r.State, r.Escrow, r.Help)
	return nil
}

// dataBox is all that `muster-node data` works with.
type dataBox struct {
	*box
	shelf metal.Shelf
	part  *data.Partition
	keep  install.HandOver
	node  fleet.NodeID
	key   papers.Ref
	log   *slog.Logger
}

func openDataBox(ctx context.Context) (*dataBox, error) {
	b, err := openBox(runDir)
	if err != nil {
		return nil, err
	}
	d := &dataBox{box: b, shelf: metal.Shelf{Dir: espDir(runDir)}, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if err := d.identity(ctx); err != nil {
		return nil, err
	}
	if d.keep, err = install.ReadHandOver(efi.NewESP(espDir(runDir))); err != nil {
		// What is there is mounted all the same; a new one would lack its
		// recovery key, and says so.
		d.log.Warn("what recovery left cannot be read", "err", err)
	}
	cfg := data.Config{Device: b.sys.Parts[firmware.LabelData], Mapped: dataMapped, At: dataAt, Node: d.node, Tools: data.Exec{}, Shelf: d.shelf,
		Now: time.Now, Log: d.log, Tenant: "unknown", Site: "unknown"}
	if cfg.ID, err = partitionID(cfg.Device); err != nil {
		return nil, err
	}
	if c, err := d.charter(); err != nil {
		d.log.Warn("there is no charter: a new data partition gets no recovery key", "err", err)
	} else {
		cfg.EscrowKey, cfg.Tenant, cfg.Site = c.EscrowKey, c.Tenant, c.Site
	}
	d.part, err = data.New(cfg)
	return d, err
}

// identity asks the TPM who this is. A TPM that does not answer leaves what the
// record says: a partition of this node is then found locked, not foreign.
func (d *dataBox) identity(ctx context.Context) error {
	t, err := device.Open(tpmPath)
	if err == nil {
		defer t.Close()
		if d.node, err = nodeIDOf(ctx, t); err == nil {
			d.key, err = papers.KeyRef(t.Signer().Public())
		}
	}
	if err == nil {
		return nil
	}
	d.log.Warn("the TPM does not say who this is", "err", err)
	m, merr := d.record().Read()
	if merr != nil || m.Node == "" {
		return errors.Join(err, merr)
	}
	d.node = m.Node
	return nil
}

// partitionID tells a partition from others without asking udev: where it is.
func partitionID(dev string) (string, error) {
	name := filepath.Base(dev)
	start, err := os.ReadFile("/sys/class/block/" + name + "/start")
	if err != nil {
		return "", err
	}
	size, err := os.ReadFile("/sys/class/block/" + name + "/size")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(start)) + "+" + strings.TrimSpace(string(size)), nil
}

// papersIn opens the documents in dir and adds those that recovery left.
func (d *dataBox) papersIn(dir string) (*papers.Papers, error) {
	o := agentOptions{siteFile: siteFile}
	site, err := o.readSite()
	if err != nil {
		return nil, err
	}
	keys, err := statement.ParseKeys([]byte(site.OrdersKeysPEM))
	if err != nil {
		return nil, err
	}
	p, err := papers.Open(papers.Config{Dir: dir, OrdersKeys: keys, Node: d.node, Key: d.key, Log: d.log})
	if err != nil {
		return nil, err
	}
	if _, err := p.Learn(d.keep.Documents); err != nil {
		d.log.Info("some documents were not taken over", "err", err)
	}
	return p, nil
}

// charter is that of the site, before there is a data partition.
func (d *dataBox) charter() (*fleet.Charter, error) {
	p, err := d.papersIn(filepath.Join(runDir, "hand-over"))
	if err != nil {
		return nil, err
	}
	if c := p.Documents().Charter; c != nil {
		return c, nil
	}
	return nil, errors.New("recovery left none that the orders keys of this image verify")
}

func openData(ctx context.Context) error {
	d, err := openDataBox(ctx)
	if err != nil {
		return err
	}
	r := d.part.Open(ctx)
	if err := r.Write(dataReport()); err != nil {
		return err
	}
	fmt.Println(r.Reason)
	if r.State != data.Mounted {
		if r.Help != "" {
			fmt.Println(r.Help)
		}
		return d.wait(ctx, r)
	}
	return d.takeOver()
}

// takeOver puts what recovery left where the agent looks. Each start does it
// again: an installation that kept the data brought newer documents.
func (d *dataBox) takeOver() error {
	if _, err := d.papersIn(filepath.Join(dataAt, "papers")); err != nil {
		return fmt.Errorf("take over documents: %w", err)
	}
	file := filepath.Join(dataAt, "identity", "identity.json")
	if _, err := os.Stat(file); err == nil || len(d.keep.Identity) == 0 {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("take over the certificate: %w", err)
	}
	// It is public; a torn one is enrolled for again.
	if err := os.WriteFile(file, d.keep.Identity, 0o644); err != nil {
		return fmt.Errorf("take over the certificate: %w", err)
	}
	return nil
}

// wait gives a person at the box time to unlock it, then goes into recovery.
func (d *dataBox) wait(ctx context.Context, r data.Report) error {
	fmt.Printf("Without help this machine restarts into recovery in %s.\n", patience)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Second) {
		if now, err := data.ReadReport(dataReport()); err == nil && now.State == data.Mounted {
			fmt.Println(now.Reason)
			return d.takeOver()
		}
	}
	if err := d.desk().Recover("the data partition is "+r.State+": "+r.Reason, restart); err != nil {
		return err
	}
	return errors.New(r.Reason)
}

// unlockData is for a person with the recovery key.
func unlockData(ctx context.Context) error {
	d, err := openDataBox(ctx)
	if err != nil {
		return err
	}
	fmt.Fprint(os.Stderr, "Recovery key: ")
	line, err := bufio.NewReader(io.LimitReader(os.Stdin, 1024)).ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	key, err := data.ParseKey(line)
	if err != nil {
		return err
	}
	defer clear(key)
	if err := d.part.UnlockWith(ctx, key); err != nil {
		return err
	}
	r := d.part.Open(ctx)
	if err := r.Write(dataReport()); err != nil {
		return err
	}
	if r.State != data.Mounted {
		return errors.New(r.Reason)
	}
	fmt.Println(r.Reason)
	return nil
}
