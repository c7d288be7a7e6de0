package k3s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	clusterbootstrap "github.com/muster-edge/muster/cluster-bootstrap"
	"github.com/muster-edge/muster/cluster-bootstrap/k3s/kube"
	"github.com/muster-edge/muster/fleet"
)

// The ledger is one ConfigMap with one key.
const (
	ledgerName   = "muster-site"
	ledgerPath   = "/api/v1/namespaces/kube-system/configmaps"
	ledgerKey    = "ledger.json"
	ledgerFormat = "muster/ledger/v1"
	maxLedger    = 64 << 10
)

type configMap struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   configMeta        `json:"metadata"`
	Data       map[string]string `json:"data"`
}

type configMeta struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
}

// ledgerDoc is the ledger as it is stored.
type ledgerDoc struct {
	Format string                  `json:"format"`
	Record clusterbootstrap.Record `json:"record"`
	Plan   *planDoc                `json:"plan,omitempty"`
}

type planDoc struct {
	ID         string         `json:"id"`
	N          uint64         `json:"n"`
	Epoch      uint64         `json:"epoch"`
	Leader     fleet.NodeID   `json:"leader"`
	Candidates []fleet.NodeID `json:"candidates"`
	Phase      string         `json:"phase"`
	Replace    bool           `json:"replace,omitempty"`
	Serial     bool           `json:"serial,omitempty"`
	Go         int            `json:"go,omitempty"`
	Reopened   bool           `json:"reopened,omitempty"`
	Off        bool           `json:"off,omitempty"`
	Failures   int            `json:"failures,omitempty"`
	Why        string         `json:"why,omitempty"`
}

var phases = []clusterbootstrap.PlanPhase{clusterbootstrap.PlanPrepare, clusterbootstrap.PlanSwitch, clusterbootstrap.PlanDone, clusterbootstrap.PlanAborted}

func encodeLedger(l clusterbootstrap.Ledger) (string, error) {
	d := ledgerDoc{Format: ledgerFormat, Record: l.Record}
	if p := l.Plan; p != nil {
		why := p.Why
		d.Plan = &planDoc{ID: p.ID, N: p.N, Epoch: p.Epoch, Leader: p.Leader, Candidates: p.Candidates, Phase: p.Phase.String(),
			Replace: p.Replace, Serial: p.Serial, Go: p.Go, Reopened: p.Reopened, Off: p.Off, Failures: p.Failures, Why: why[:min(len(why), 500)]}
	}
	b, err := json.Marshal(d)
	if err != nil {
		return "", fmt.Errorf("k3s: write ledger: %w", err)
	}
	// What cannot be read back must not be written.
	if _, err := decodeLedger(b); err != nil {
		return "", err
	}
	return string(b), nil
}

func decodeLedger(b []byte) (clusterbootstrap.Ledger, error) {
	var d ledgerDoc
	if len(b) > maxLedger {
		return clusterbootstrap.Ledger{}, fmt.Errorf("k3s: read ledger: larger than %d bytes", maxLedger)
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return clusterbootstrap.Ledger{}, fmt.Errorf("k3s: read ledger: %w", err)
	}
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("k3s: read ledger: "+format, args...))
		}
	}
	nodes := func(ids []fleet.NodeID) {
		check(len(ids) <= fleet.MaxRecordServers, "%d nodes in a list", len(ids))
		for _, n := range ids[:min(len(ids), fleet.MaxRecordServers)] {
			errs = append(errs, n.Validate())
		}
	}
	check(d.Format == ledgerFormat, "format %.40q", d.Format)
	errs = append(errs, fleet.ValidateClusterUID(d.Record.UID), d.Record.Founder.Validate())
	check(d.Record.Epoch > 0 && d.Record.Epoch <= fleet.MaxClusterEpoch, "epoch %d", d.Record.Epoch)
	if d.Record.Into != "" {
		errs = append(errs, fleet.ValidateClusterUID(d.Record.Into))
	}
	nodes(d.Record.Servers)
	l := clusterbootstrap.Ledger{Record: d.Record}
	if p := d.Plan; p != nil {
		x := clusterbootstrap.PlanDoc{ID: p.ID, N: p.N, Epoch: p.Epoch, Leader: p.Leader, Candidates: p.Candidates,
			Replace: p.Replace, Serial: p.Serial, Go: p.Go, Reopened: p.Reopened, Off: p.Off, Failures: p.Failures, Why: p.Why}
		for _, ph := range phases {
			if ph.String() == p.Phase {
				x.Phase = ph
			}
		}
		check(x.Phase != 0, "phase %.40q", p.Phase)
		check(planID.MatchString(p.ID), "plan %.80q", p.ID)
		check(p.Failures >= 0 && p.Go >= 0 && p.Go <= len(p.Candidates), "failures %d, go %d", p.Failures, p.Go)
		check(len(p.Why) <= 1000, "why has %d bytes", len(p.Why))
		errs = append(errs, p.Leader.Validate())
		nodes(p.Candidates)
		l.Plan = &x
	}
	if err := errors.Join(errs...); err != nil {
		return clusterbootstrap.Ledger{}, err
	}
	return l, nil
}

func ledgerOf(c configMap) (*clusterbootstrap.Ledger, error) {
	l, err := decodeLedger([]byte(c.Data[ledgerKey]))
	if err != nil {
		return nil, err
	}
	if l.Version, err = strconv.ParseUint(c.Metadata.ResourceVersion, 10, 64); err != nil {
		return nil, fmt.Errorf("k3s: read ledger: resource version: %w", err)
	}
	return &l, nil
}

// readLedger reads the ledger; nil if there is none. A GET of one object
// without a resource version goes to etcd and takes quorum: linearizable.
func readLedger(ctx context.Context, c *kube.Client) (*clusterbootstrap.Ledger, error) {
	var cm configMap
	err := c.Get(ctx, ledgerPath+"/"+ledgerName, &cm)
	if kube.IsStatus(err, http.StatusNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("k3s: read ledger: %w", err)
	}
	return ledgerOf(cm)
}

// ReadLedger reads the ledger linearizably; nil if there is none.
func (m *Manager) ReadLedger(ctx context.Context) (*clusterbootstrap.Ledger, error) {
	c, err := m.admin()
	if err != nil {
		return nil, err
	}
	return readLedger(ctx, c)
}

// WriteLedger puts l if the stored version is still l.Version (0: there must
// be none), and returns the new version; ErrConflict if not. After any other
// error it may be written or not: read it again.
func (m *Manager) WriteLedger(ctx context.Context, l clusterbootstrap.Ledger) (uint64, error) {
	c, err := m.admin()
	if err != nil {
		return 0, err
	}
	text, err := encodeLedger(l)
	if err != nil {
		return 0, err
	}
	in := configMap{APIVersion: "v1", Kind: "ConfigMap", Data: map[string]string{ledgerKey: text},
		Metadata: configMeta{Name: ledgerName, Namespace: "kube-system", Labels: map[string]string{managedBy: managedByUs}}}
	var out configMap
	if l.Version == 0 {
		err = c.Post(ctx, ledgerPath, in, &out)
	} else {
		in.Metadata.ResourceVersion = strconv.FormatUint(l.Version, 10)
		err = c.Put(ctx, ledgerPath+"/"+ledgerName, in, &out)
	}
	switch {
	case kube.IsStatus(err, http.StatusConflict), l.Version != 0 && kube.IsStatus(err, http.StatusNotFound):
		return 0, fmt.Errorf("%w: %w", ErrConflict, err)
	case err != nil:
		return 0, fmt.Errorf("k3s: write ledger: %w", err)
	}
	n, err := ledgerOf(out)
	if err != nil {
		return 0, err
	}
	return n.Version, nil
}
