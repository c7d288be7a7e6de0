package image

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"

	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// realConfig is a build with Debian's packages. It skips where neither they
// nor a way to get them is there.
func realConfig(t *testing.T) RecoveryConfig {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped with -short: builds a whole image")
	}
	for _, tool := range []string{"dpkg-deb", "apt-cache", "apt-get"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not here: images are built on Debian or Ubuntu", tool)
		}
	}
	base, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no cache folder: %v", err)
	}
	cache := filepath.Join(base, "muster", "debs")
	debs := archiveCache{dir: cache, note: t.Logf}
	// Online or with a filled cache, this succeeds.
	lock, err := choosePackages(t.Context(), debs, RecoveryConfig{Flavour: FlavourCloud})
	if err != nil {
		t.Skipf("apt knows no packages here: %v", err)
	}
	for _, p := range lock.Packages {
		if _, err := debs.fetch(t.Context(), p); err != nil {
			t.Skipf("the packages are not in %s and cannot be fetched: %v", cache, err)
		}
	}
	// Any static ELF file will do; the test's own may be linked with cgo.
	node := filepath.Join(t.TempDir(), "node")
	src := filepath.Join(filepath.Dir(node), "main.go")
	if err := os.WriteFile(src, []byte("package main\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", node, src)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64", "GOOS=linux", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return RecoveryConfig{
		OutDir: t.TempDir(), Version: "1.0", Flavour: FlavourCloud, NodeBinary: node, CacheDir: cache, Lock: &lock,
		Site:    fleet.SiteConfig{Centre: []string{"https://centre.example:7444"}, RootsPEM: rootPEM(t, true)},
		Release: key,
		Formats: []string{FormatDisk, FormatISO},
	}
}

// The list must fit the kernel of PCs too; its package is large, so it is not
// fetched for this.
func TestModulesOfTheGenericKernel(t *testing.T) {
	cfg := realConfig(t)
	debs := archiveCache{dir: cfg.CacheDir, note: t.Logf}
	lock, err := choosePackages(t.Context(), debs, RecoveryConfig{Flavour: FlavourGeneric})
	if err != nil {
		t.Skipf("apt knows no generic kernel here: %v", err)
	}
	p := lock.Packages[0]
	if _, err := os.Stat(debs.path(p)); err != nil {
		t.Skipf("%s is not in the cache (a build with --kernel generic puts it there): %v", p.Name, err)
	}
	deb, err := debs.fetch(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	k, _, err := readKernel(t.Context(), deb, strings.TrimPrefix(p.Name, "linux-image-"), FlavourGeneric, modulesText+"\n"+slotModulesText)
	if err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, n := range k.sizes {
		total += n
	}
	t.Logf("%d modules, %d bytes", len(k.paths), total)
	for _, f := range k.modules {
		if strings.HasSuffix(f.path, "/modules.dep") {
			checkOrder(t, modulePlan{dep: string(f.data), paths: k.paths})
		}
	}
}

func TestBuildIsReproducible(t *testing.T) {
	cfg := realConfig(t)
	one, err := Build(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(filepath.Join(cfg.OutDir, RecoveryFile))
	if err != nil {
		t.Fatal(err)
	}

	again := cfg
	again.OutDir = filepath.Join(t.TempDir(), "deeper", "folder")
	defer syscall.Umask(syscall.Umask(0o077))
	t.Setenv("TZ", "Pacific/Kiritimati")
	t.Setenv("SOURCE_DATE_EPOCH", "1")
	t.Setenv("LC_ALL", "tr_TR.UTF-8")
	two, err := Build(t.Context(), again)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(filepath.Join(again.OutDir, RecoveryFile))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("another folder, umask and time zone gave other bytes")
	}
	a, err := one.Manifest.JSON()
	if err != nil {
		t.Fatal(err)
	}
	b, err := two.Manifest.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the manifests differ")
	}
	if one.TimeFloor.Year() < 2022 {
		t.Errorf("the time floor %v is not the date of the packages", one.TimeFloor)
	}
	t.Logf("%s: %d bytes, goal %d", RecoveryFile, len(first), RecoveryGoal)
	if len(first) > RecoveryGoal {
		t.Errorf("%d bytes are over the goal of %d", len(first), RecoveryGoal)
	}

	checkInitrd(t, cfg, first, one)
	checkSystemdMeasure(t, first, one.Manifest.Measurements.PCR11)
	checkVerify(t, cfg, first)
	checkSigned(t, cfg, first, one.Manifest.Measurements)
}

// checkInitrd reads the initrd back out of the finished image.
func checkInitrd(t *testing.T, cfg RecoveryConfig, efi []byte, r Result) {
	t.Helper()
	pe, err := firmware.ParsePE(efi)
	if err != nil {
		t.Fatal(err)
	}
	packed, err := pe.Section(firmware.SectionInitrd)
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	archive := cpio.NewReader(z)
	modules := 0
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case h.Name == "init":
			node, err := os.ReadFile(cfg.NodeBinary)
			if err != nil || !bytes.Equal(node, data) || h.Mode != 0o100755 {
				t.Errorf("/init is not the node binary (%v), mode %o", err, h.Mode)
			}
		case h.Name == "etc/muster/site.json":
			var site fleet.SiteConfig
			if err := json.Unmarshal(data, &site); err != nil || site.Centre[0] != cfg.Site.Centre[0] || !site.TimeFloor.Equal(r.TimeFloor) || site.Image != "recovery" {
				t.Errorf("site.json: %+v, %v", site, err)
			}
		case strings.HasSuffix(h.Name, ".ko"):
			modules++
			// A kernel under Secure Boot loads signed modules only.
			if !bytes.HasSuffix(data, []byte("~Module signature appended~\n")) {
				t.Errorf("%s lost its signature", h.Name)
			}
		}
	}
	if modules != len(r.Modules) || modules < 20 {
		t.Errorf("%d modules in the initrd, %d in the result", modules, len(r.Modules))
	}
}

// checkSystemdMeasure compares PCR 11 with systemd's own calculation.
func checkSystemdMeasure(t *testing.T, efi []byte, want firmware.Digest) {
	t.Helper()
	tool := "/usr/lib/systemd/systemd-measure"
	out, err := exec.Command(tool, "--version").Output()
	if err != nil || !strings.HasPrefix(string(out), "systemd 252") {
		t.Logf("NOT compared with systemd-measure: %s of version 252 is not here", tool)
		return
	}
	pe, err := firmware.ParsePE(efi)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// An empty phase path is the value right after the stub.
	args := []string{"calculate", "--bank=sha256", "--phase=", "--json=short"}
	for _, s := range []string{firmware.SectionLinux, firmware.SectionOSRel, firmware.SectionCmdline, firmware.SectionInitrd} {
		data, err := pe.Section(s)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, s[1:])
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--"+s[1:]+"="+path)
	}
	out, err = exec.Command(tool, args...).Output()
	if err != nil {
		t.Fatalf("systemd-measure: %v", err)
	}
	if !strings.Contains(string(out), want.String()) {
		t.Errorf("PCR 11 is %s here, systemd-measure says %s", want, out)
	}
}

// checkVerify wants a good image to pass and any change to be named.
func checkVerify(t *testing.T, cfg RecoveryConfig, efi []byte) {
	t.Helper()
	keys := []crypto.PublicKey{cfg.Release.Public()}
	failed := func() []string {
		t.Helper()
		checks, err := Verify(cfg.OutDir, keys)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, c := range checks {
			if !c.OK {
				names = append(names, c.Name)
			}
		}
		return names
	}
	if bad := failed(); len(bad) > 0 {
		t.Errorf("a good image fails %v", bad)
	}
	path := filepath.Join(cfg.OutDir, RecoveryFile)
	changed := bytes.Clone(efi)
	changed[len(changed)-1000] ^= 1 // in the initrd
	if err := os.WriteFile(path, changed, 0o644); err != nil {
		t.Fatal(err)
	}
	if bad := strings.Join(failed(), ", "); bad != "sha256, authenticode (PCR 4), section .initrd, PCR 11" {
		t.Errorf("a changed initrd fails %s", bad)
	}
	if err := os.WriteFile(path, efi, 0o644); err != nil {
		t.Fatal(err)
	}
	lockPath := filepath.Join(cfg.OutDir, LockFile)
	lock, err := os.ReadFile(lockPath)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(lockPath, bytes.Replace(lock, []byte(`"sha256": "`), []byte(`"sha256": "00`), 1)[:len(lock)], 0o644); err != nil {
		t.Fatal(err)
	}
	if bad := strings.Join(failed(), ", "); bad != "lock" {
		t.Errorf("with another lock, %q fails", bad)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys = []crypto.PublicKey{other.Public()}
	if bad := strings.Join(failed(), ", "); bad != "manifest" {
		t.Errorf("with another release key, %q fails", bad)
	}
	if _, err := Verify(t.TempDir(), keys); err == nil {
		t.Error("an empty folder was verified")
	}
}

// checkSigned signs the image for Secure Boot with another program.
func checkSigned(t *testing.T, cfg RecoveryConfig, efi []byte, want firmware.Measurements) {
	t.Helper()
	for _, tool := range []string{"sbsign", "sbverify", "openssl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Logf("NOT signed: %s is not here", tool)
			return
		}
	}
	dir := t.TempDir()
	newPair := func(name string) (string, string) {
		key, cert := filepath.Join(dir, name+".key"), filepath.Join(dir, name+".pem")
		if out, err := exec.Command("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "100", "-subj", "/CN="+name, "-keyout", key, "-out", cert).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return key, cert
	}
	cfg.OutDir = t.TempDir()
	cfg.SignKey, cfg.SignCert = newPair("db")
	r, err := Build(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	m := r.Manifest.Measurements
	if m.Authenticode != want.Authenticode || m.PCR11 != want.PCR11 || m.Kernel != want.Kernel {
		t.Error("the signature changed the measurements")
	}
	text, err := os.ReadFile(cfg.SignCert)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if got := r.Manifest.SecureBoot.SignerCertSHA256; got != sha256.Sum256(block.Bytes) {
		t.Errorf("the manifest names the certificate %s", got)
	}
	checks, err := Verify(cfg.OutDir, []crypto.PublicKey{cfg.Release.Public()})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if !c.OK {
			t.Errorf("%s: %s", c.Name, c.Detail)
		}
	}
	cfg.SignKey, _ = newPair("other")
	cfg.Note = t.Logf
	if _, err := sign(t.Context(), cfg, made{efi: efi, measured: want}); err == nil || !strings.Contains(err.Error(), "belong") {
		t.Errorf("a key without its certificate: %v", err)
	}
}
