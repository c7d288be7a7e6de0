package server_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/httpboot"
	"github.com/muster-edge/muster/pxe/internal/edk2"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

// authority is a CA that certifies addresses.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
	// hello, if set, is told what a client offers.
	hello func(*tls.ClientHelloInfo)
	new   func() (crypto.Signer, error)
}

func ecKey() (crypto.Signer, error)  { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }
func rsaKey() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) }

func newAuthority(t testing.TB, newKey func() (crypto.Signer, error)) *authority {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "boot CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool(), new: newKey}
	a.pool.AddCert(cert)
	return a
}

// tls is server.Config.TLS.
func (a *authority) tls(addr netip.Addr) (*tls.Config, error) {
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), IPAddresses: []net.IP{addr.AsSlice()}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(0, 1, 0)}
	key, err := a.new()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	out := httpboot.FirmwareTLS()
	out.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	if a.hello != nil {
		out.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { a.hello(h); return nil, nil }
	}
	return out, nil
}

func TestHTTPSBoot(t *testing.T) {
	ours, foreign := newAuthority(t, ecKey), newAuthority(t, ecKey)
	long := []time.Duration{2100 * time.Millisecond, time.Second}
	for _, c := range []struct {
		name  string
		only  bool
		proxy bool
		edit  func(*edk2.Client)
		// first and second are how the URL of two boots in a row begins, ""
		// for a boot that fails.
		first, second string
		by            string
	}{
		{name: "firmware with our CA", edit: func(c *edk2.Client) { c.Roots = ours.pool }, first: "https://10.77.0.1:7481/", second: "https://", by: "sent by https"},
		{name: "the same beside another DHCP server", proxy: true, edit: func(c *edk2.Client) { c.Roots = ours.pool }, first: "https://", second: "https://", by: "sent by https"},
		{name: "firmware without a CA gets plain HTTP at its second boot", edit: func(c *edk2.Client) {}, second: "http://10.77.0.1:7480/", by: "sent by http"},
		{name: "firmware with a foreign CA, too", edit: func(c *edk2.Client) { c.Roots = foreign.pool }, second: "http://", by: "sent by http"},
		{name: "firmware whose clock is ten years ahead, too", edit: func(c *edk2.Client) {
			c.Roots = ours.pool
			c.Clock = func() time.Time { return time.Now().AddDate(9, 11, 0) }
		}, second: "http://", by: "sent by http"},
		{name: "with HTTPS only, firmware without a CA gets nothing", only: true, edit: func(c *edk2.Client) {}},
		{name: "with HTTPS only, firmware with our CA boots", only: true, edit: func(c *edk2.Client) { c.Roots = ours.pool }, first: "https://", second: "https://", by: "sent by https"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			dir, data := image(t, 700_001)
			cfg := full(t, lan, dir)
			if c.proxy {
				site(t, lan)
				cfg = proxy(lan, dir, pxe.Recover)
			}
			cfg.HTTPSAddr, cfg.TLS, cfg.HTTPSOnly = ":7481", ours.tls, c.only
			_, rec := start(t, cfg)
			h := lan.Host(t)
			for i, want := range []string{c.first, c.second} {
				res, err := boot(h, func(f *edk2.Client) {
					http(f)
					f.Wait = long
					c.edit(f)
				})
				if want == "" {
					if err == nil {
						t.Errorf("boot %d got %d bytes from %s", i+1, len(res.Data), res.File)
					}
					if c.only && strings.HasPrefix(res.File, "http://") {
						t.Errorf("boot %d was offered %s", i+1, res.File)
					}
					continue
				}
				if err != nil || !strings.HasPrefix(res.File, want) || !bytes.Equal(res.Data, data) {
					t.Errorf("boot %d: %d bytes from %q, %v", i+1, len(res.Data), res.File, err)
				}
			}
			if c.by != "" {
				netlab.Eventually(t, 2*time.Second, c.by, func() bool { return rec.has(pxe.StateServed, c.by) })
			}
			if c.only && rec.has(pxe.StateServed, "sent by http ") {
				t.Error("plain HTTP was used")
			}
		})
	}
}

func TestHTTPSNeedsACertificate(t *testing.T) {
	lan := netlab.NewLAN(t, "10.77.0.1/24")
	dir, _ := image(t, 1000)
	cfg := full(t, lan, dir)
	cfg.StateDir, cfg.WatchEvery = t.TempDir(), -1
	cfg.HTTPSAddr = ":7481"
	if s, err := server.New(cfg); err != nil {
		t.Errorf("with a CA of its own: %v", err)
	} else if err := s.Close(); err != nil {
		t.Error(err)
	}
	cfg.Mode, cfg.StateDir = pxe.ModeOff, ""
	if _, err := server.New(cfg); err == nil || !strings.Contains(err.Error(), "TLS") {
		t.Errorf("without a certificate: %v", err)
	}
	cfg.Mode, cfg.StateDir = pxe.ModeFull, t.TempDir()
	no := errors.New("no CA")
	cfg.TLS = func(netip.Addr) (*tls.Config, error) { return nil, no }
	if _, err := server.New(cfg); !errors.Is(err, no) {
		t.Errorf("with a CA that fails: %v", err)
	}
	cfg.HTTPSAddr, cfg.HTTPSOnly = "", true
	if _, err := server.New(cfg); err == nil || !strings.Contains(err.Error(), "HTTPSOnly") {
		t.Errorf("HTTPS only, nowhere: %v", err)
	}
}

// Boot on a VLAN: the boot host serves the tagged network and no other; a
// machine on the untagged one, or on another VLAN, hears nothing.
func TestVLAN(t *testing.T) {
	lan := netlab.NewLAN(t)
	tagged := lan.VLAN(t, 30, "10.77.0.1/24")
	dir, data := image(t, 300_001)
	cfg := full(t, lan, dir)
	cfg.Interface = tagged
	start(t, cfg)
	for _, c := range []struct {
		name  string
		vlan  int
		boots bool
		edit  func(*edk2.Client)
	}{
		{"on the VLAN, by TFTP", 30, true, nil},
		{"on the VLAN, by HTTP", 30, true, http},
		{"on another VLAN", 31, false, nil},
		{"untagged", 0, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := lan.Host(t)
			fw := firmware(h)
			if c.vlan != 0 {
				fw.Iface = h.VLAN(t, c.vlan)
			}
			if c.edit != nil {
				c.edit(fw)
			}
			var res edk2.Result
			err := h.Do(func() (err error) { res, err = fw.Boot(); return err })
			if c.boots && (err != nil || !bytes.Equal(res.Data, data)) {
				t.Errorf("%d bytes, %v", len(res.Data), err)
			}
			if !c.boots && !errors.Is(err, edk2.ErrNoOffer) {
				t.Errorf("booted from %q: %v", res.File, err)
			}
		})
	}
}
