package scenario

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/muster-edge/muster/central/store"
	"github.com/muster-edge/muster/central/store/sqlite"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

func macBytes(m *machine.Machine) []byte {
	hw, err := net.ParseMAC(m.MAC())
	if err != nil {
		return nil // the machine was made with it
	}
	return hw
}

// issued reads what the centre, which has ended, has on its disk.
func issued(ctx context.Context, l *lab.Lab, requests []fleet.Request) (map[fleet.RequestID]store.Issued, error) {
	db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(centreDir(l), "muster.db")})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	out := map[fleet.RequestID]store.Issued{}
	err = db.View(ctx, func(r store.Reader) error {
		for _, q := range requests {
			i, err := r.Issued(q.Tenant, q.ID)
			if errors.Is(err, store.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			out[q.ID] = i
		}
		return nil
	})
	return out, err
}

func checkNoneIssued(ctx context.Context, l *lab.Lab, requests []fleet.Request) error {
	got, err := issued(ctx, l, requests)
	if err != nil {
		return err
	}
	for id, i := range got {
		return fmt.Errorf("request %s has certificate %s", id, i.Serial)
	}
	return nil
}

// checkIssued looks at the certificates with the standard library alone: it
// must not repeat the mistakes of the code that made them.
func checkIssued(ctx context.Context, l *lab.Lab, requests []fleet.Request) error {
	if len(requests) != l.Spec.Nodes {
		return fmt.Errorf("%d requests of %d machines", len(requests), l.Spec.Nodes)
	}
	got, err := issued(ctx, l, requests)
	if err != nil {
		return err
	}
	roots, err := readRoots(l.Path(rootCA))
	if err != nil {
		return err
	}
	orders, err := readOrdersKey(l.Path(ordersKey))
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range requests {
		i, ok := got[r.ID]
		if !ok {
			errs = append(errs, fmt.Errorf("request %s has no certificate", r.ID))
			continue
		}
		if err := checkChain(i.Certificates, roots, r, time.Now()); err != nil {
			errs = append(errs, fmt.Errorf("request %s: %w", r.ID, err))
		}
		if err := checkAdmission(i.Documents, orders, r, time.Now()); err != nil {
			errs = append(errs, fmt.Errorf("request %s: %w", r.ID, err))
		}
	}
	return errors.Join(errs...)
}

func readRoots(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate", path)
	}
	return pool, nil
}

// checkChain checks a node's certificate (DER, leaf first) against the
// request that was approved.
func checkChain(chain [][]byte, roots *x509.CertPool, r fleet.Request, now time.Time) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	var certs []*x509.Certificate
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		certs = append(certs, c)
	}
	leaf, between := certs[0], x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		bad("chain: %w", err)
	}
	if leaf.Subject.String() != "CN="+string(r.Node) {
		bad("subject is %q, want CN=%s", leaf.Subject, r.Node)
	}
	wantURI := "spiffe://" + r.Tenant + ".muster.internal/node/" + string(r.Node)
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != wantURI {
		bad("URIs are %v, want %s", leaf.URIs, wantURI)
	}
	wantDNS := string(r.Node) + "." + r.Site + "." + r.Tenant + ".node.muster.internal"
	if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != wantDNS {
		bad("DNS names are %v, want %s", leaf.DNSNames, wantDNS)
	}
	if len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 {
		bad("there are other names: %v %v", leaf.IPAddresses, leaf.EmailAddresses)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		bad("CA %v, key usage %b", leaf.IsCA, leaf.KeyUsage)
	}
	if len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(leaf.UnknownExtKeyUsage) > 0 {
		bad("extended key usages are %v, want client authentication only", leaf.ExtKeyUsage)
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life < 30*24*time.Hour || life > 30*24*time.Hour+time.Hour {
		bad("it is good for %v, want 30 days", life)
	}
	der, err := x509.MarshalPKIXPublicKey(leaf.PublicKey)
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(der); !bytes.Equal(sum[:], r.Evidence.LDevIDKey) {
		bad("its key %x is not the one that the TPM proved, %x", sum, []byte(r.Evidence.LDevIDKey))
	}
	return errors.Join(errs...)
}
