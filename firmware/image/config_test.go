package image

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/muster-edge/muster/fleet"
)

func rootPEM(t *testing.T, ca bool) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: ca, BasicConstraintsValid: true,
		NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestConfig(t *testing.T) {
	root := rootPEM(t, true)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	privatePEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	good := func() RecoveryConfig {
		cfg, err := RecoveryConfig{
			OutDir: "out", Version: "1.0", NodeBinary: "node", CacheDir: "cache", Release: key,
			Site: fleet.SiteConfig{Centre: []string{"https://centre.example:7444"}, RootsPEM: root},
		}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	if err := good().validate(); err != nil {
		t.Fatal(err)
	}
	if cfg := good(); cfg.Flavour != FlavourGeneric || cfg.Site.Image != "recovery" || cfg.Site.Version != "1.0" || !strings.Contains(cfg.Site.ReleaseKeysPEM, "PUBLIC KEY") {
		t.Errorf("defaults: %+v", cfg)
	}
	for when, c := range map[string]struct {
		change  func(*RecoveryConfig)
		problem string
	}{
		"there is no output":           {func(c *RecoveryConfig) { c.OutDir = "" }, "--out"},
		"there is no node program":     {func(c *RecoveryConfig) { c.NodeBinary = "" }, "--node-binary"},
		"the version is unsafe":        {func(c *RecoveryConfig) { c.Version = "1\"\nID=x" }, "version"},
		"the kernel is unknown":        {func(c *RecoveryConfig) { c.Flavour = "rt" }, "neither cloud nor generic"},
		"the key has no certificate":   {func(c *RecoveryConfig) { c.SignKey = "k" }, "go together"},
		"a centre is not https":        {func(c *RecoveryConfig) { c.Site.Centre = []string{"http://x"} }, "https"},
		"a centre holds a password":    {func(c *RecoveryConfig) { c.Site.Centre = []string{"https://a:b@x"} }, "https"},
		"the centre has no root":       {func(c *RecoveryConfig) { c.Site.RootsPEM = "" }, "--root-ca"},
		"the root is a leaf":           {func(c *RecoveryConfig) { c.Site.RootsPEM = rootPEM(t, false) }, "not a CA"},
		"the root file has a key":      {func(c *RecoveryConfig) { c.Site.RootsPEM += privatePEM }, "only certificates"},
		"the root file is empty":       {func(c *RecoveryConfig) { c.Site.RootsPEM = "x" }, "no certificate"},
		"the orders key is private":    {func(c *RecoveryConfig) { c.Site.OrdersKeysPEM = privatePEM }, "--orders-key"},
		"the address has no length":    {func(c *RecoveryConfig) { c.Site.Network.Address = "192.0.2.1" }, "--address"},
		"a gateway has no address":     {func(c *RecoveryConfig) { c.Site.Network.Gateway = "192.0.2.1" }, "--gateway"},
		"a name server is a name":      {func(c *RecoveryConfig) { c.Site.Network.DNS = []string{"dns"} }, "--dns"},
		"the VLAN is too large":        {func(c *RecoveryConfig) { c.Site.Network.VLAN = 4095 }, "--vlan"},
		"the proxy has a password":     {func(c *RecoveryConfig) { c.Site.Network.Proxy = "http://a:b@p:1" }, "password"},
		"the proxy is no URL":          {func(c *RecoveryConfig) { c.Site.Network.Proxy = "p:1" }, "--proxy"},
		"the hardware address is none": {func(c *RecoveryConfig) { c.Site.Network.MAC = "x" }, "--mac"},
		"the format is unknown":        {func(c *RecoveryConfig) { c.Formats = []string{"uki", "vhd"} }, "--format"},
	} {
		cfg := good()
		c.change(&cfg)
		err := cfg.validate()
		if err == nil || !strings.Contains(err.Error(), c.problem) {
			t.Errorf("when %s, then want an error about %q, got %v", when, c.problem, err)
		}
	}
	two := good()
	two.OutDir, two.Flavour = "", "rt"
	if err := two.validate(); err == nil || !strings.Contains(err.Error(), "--out") || !strings.Contains(err.Error(), "rt") {
		t.Errorf("want all problems at once, got %v", err)
	}
}

func TestConfigOfAScan(t *testing.T) {
	scan := func(change func(*RecoveryConfig)) error {
		cfg := RecoveryConfig{OutDir: "out", Version: "1.0", NodeBinary: "node", CacheDir: "cache", Formats: []string{FormatDisk}, Site: fleet.SiteConfig{Scan: &fleet.ScanConfig{Site: "shop-1"}}}
		change(&cfg)
		cfg, err := cfg.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		return cfg.validate()
	}
	if err := scan(func(*RecoveryConfig) {}); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*RecoveryConfig){
		"give --format disk":   func(c *RecoveryConfig) { c.Formats = []string{FormatISO} },
		"leave --kernel out":   func(c *RecoveryConfig) { c.Flavour = FlavourCloud },
		"leave --centre":       func(c *RecoveryConfig) { c.Site.Centre, c.Site.RootsPEM = []string{"https://c:1"}, rootPEM(t, true) },
		"calls nobody":         func(c *RecoveryConfig) { c.Site.Claim = "x" },
		"--mode scan needs no": func(c *RecoveryConfig) { c.Site.Network.VLAN = 7 },
		"No Shop":              func(c *RecoveryConfig) { c.Site.Scan = &fleet.ScanConfig{Site: "No Shop"} },
	} {
		if err := scan(change); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestLock(t *testing.T) {
	l := Lock{Packages: []Package{{"b", "1", [32]byte{1}}, {"a1", "2:1~x", [32]byte{2}}}}
	l.Packages[0].Name = "bb"
	text, err := l.JSON()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseLock(text)
	if err != nil || len(got.Packages) != 2 || got.Packages[0].Name != "a1" {
		t.Fatalf("%+v, %v", got, err)
	}
	good := string(text)
	for when, bad := range map[string]string{
		"the format is another":       strings.Replace(good, "lock/v1", "lock/v2", 1),
		"a field is unknown":          strings.Replace(good, `"name"`, `"nome"`, 1),
		"there is data after it":      good + "{}",
		"a name is an option":         strings.Replace(good, `"a1"`, `"-a"`, 1),
		"a version has a slash":       strings.Replace(good, `"2:1~x"`, `"../x"`, 1),
		"a package is there twice":    strings.Replace(good, `"a1"`, `"bb"`, 1),
		"a digest is short":           strings.Replace(good, `"02`, `"`, 1),
		"it is larger than a lock is": good + strings.Repeat(" ", maxLock),
	} {
		if _, err := ParseLock([]byte(bad)); err == nil {
			t.Errorf("when %s, then it is read", when)
		}
	}
}

func FuzzParseLock(f *testing.F) {
	f.Add([]byte(`{"format":"muster/image-lock/v1","packages":[{"name":"aa","version":"1","sha256":"0101010101010101010101010101010101010101010101010101010101010101"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := ParseLock(b)
		if err != nil {
			return
		}
		text, err := l.JSON()
		if err != nil {
			t.Fatal(err)
		}
		if len(text) <= maxLock {
			if _, err := ParseLock(text); err != nil {
				t.Fatalf("written but not read: %v", err)
			}
		}
	})
}
