package server_test

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/muster-edge/muster/pxe"
	"github.com/muster-edge/muster/pxe/internal/netlab"
	"github.com/muster-edge/muster/pxe/server"
)

// The model of EDK2 is only as good as our reading; this is the real one
// (OVMF in QEMU, without an accelerator). What it fetches is no program, so
// it says so and tries again: reaching "served" is all that is tested.
func TestRealFirmwareFetches(t *testing.T) {
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	const code, vars = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	for _, f := range []string{code, vars} {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("OVMF is not installed: %v", err)
		}
	}
	dir, _ := image(t, 300_001)
	noPXE := []string{"-fw_cfg", "name=opt/org.tianocore/IPv4PXESupport,string=no"}
	const mac = "52:54:00:aa:bb:01"
	for _, c := range []struct {
		name  string
		proxy bool
		by    string
		args  []string
		// https serves HTTPS alone, with a key of this kind; enrolled puts
		// the CA into the firmware.
		https    string
		enrolled bool
	}{
		{name: "full-pxe", by: "by tftp"},
		{name: "proxy-pxe", proxy: true, by: "by tftp"},
		{name: "proxy-http", proxy: true, by: "by http", args: noPXE},
		{name: "full-https-rsa", by: "by https", args: noPXE, https: "rsa", enrolled: true},
		{name: "full-https-not-enrolled", by: "", args: noPXE, https: "rsa"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			cfg := full(t, lan, dir)
			if c.proxy {
				site(t, lan)
				cfg = proxy(lan, dir, pxe.Recover)
			}
			work := t.TempDir()
			if c.https != "" {
				ca := newAuthority(t, rsaKey)
				ca.hello = func(h *tls.ClientHelloInfo) {
					t.Logf("the firmware offers TLS versions %x, suites %x, curves %v", h.SupportedVersions, h.CipherSuites, h.SupportedCurves)
				}
				cfg.HTTPAddr, cfg.HTTPSAddr, cfg.HTTPSOnly, cfg.TLS = "-", ":7481", true, ca.tls
				if c.enrolled {
					list := filepath.Join(work, "cacerts")
					if err := os.WriteFile(list, signatureList(ca.cert.Raw), 0o600); err != nil {
						t.Fatal(err)
					}
					c.args = append(append([]string(nil), c.args...), "-fw_cfg", "name=etc/edk2/https/cacerts,file="+list)
				}
			}
			tap := lan.Tap(t)
			_, rec := start(t, cfg)
			v, err := os.ReadFile(vars)
			if err == nil {
				err = os.WriteFile(filepath.Join(work, "vars"), v, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			out, err := os.Create(filepath.Join(work, "out"))
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			args := append([]string{"-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
				"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + code, "-drive", "if=pflash,unit=1,format=raw,file=" + filepath.Join(work, "vars"),
				"-netdev", "tap,id=n0,script=no,downscript=no,ifname=" + tap, "-device", "virtio-net-pci,netdev=n0,romfile=,bootindex=1,mac=" + mac,
				"-fw_cfg", "name=opt/org.tianocore/IPv6PXESupport,string=no", "-serial", "file:" + filepath.Join(work, "serial")}, c.args...)
			netlab.Start(t, out, "qemu-system-x86_64", args...)
			t.Cleanup(func() {
				if t.Failed() {
					for _, f := range []string{"out", "serial"} {
						b, _ := os.ReadFile(filepath.Join(work, f))
						t.Logf("%s:\n%s", f, b)
					}
				}
			})
			begun := time.Now()
			if c.by == "" {
				netlab.Eventually(t, 2*time.Minute, "firmware gives up", func() bool {
					b, _ := os.ReadFile(filepath.Join(work, "serial"))
					return bytes.Contains(b, []byte("Could not retrieve NBP file size"))
				})
				if rec.has(pxe.StateServed, "") || rec.has(pxe.StateFetching, "") {
					t.Error("firmware fetches from a server that it does not trust")
				}
				return
			}
			netlab.Eventually(t, 2*time.Minute, "firmware has fetched "+server.ImageName, func() bool { return rec.has(pxe.StateServed, c.by) })
			t.Logf("served %.1f s after power-on", time.Since(begun).Seconds())
			for _, e := range rec.all() {
				if e.MAC.String() != mac || e.Alarm {
					t.Errorf("odd event: %s", e)
				}
			}
			rec.dump(t)
		})
	}
}

// signatureList is an EFI_SIGNATURE_LIST of type EFI_CERT_X509_GUID with one
// certificate (UEFI 2.10 section 32.4.1), which OVMF takes into its
// TlsCaCertificate variable from fw_cfg.
func signatureList(der []byte) []byte {
	b := []byte{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
	b = binary.LittleEndian.AppendUint32(b, uint32(28+16+len(der)))
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(16+len(der)))
	return append(append(b, make([]byte, 16)...), der...)
}
