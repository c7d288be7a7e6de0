package server_test

import (
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
	const mac = "52:54:00:aa:bb:01"
	for _, c := range []struct {
		name  string
		proxy bool
		by    string
		args  []string
	}{
		{"full-pxe", false, "by tftp", nil},
		{"proxy-pxe", true, "by tftp", nil},
		{"proxy-http", true, "by http", []string{"-fw_cfg", "name=opt/org.tianocore/IPv4PXESupport,string=no"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			lan := netlab.NewLAN(t, "10.77.0.1/24")
			cfg := full(t, lan, dir)
			if c.proxy {
				site(t, lan)
				cfg = proxy(lan, dir, pxe.Recover)
			}
			tap := lan.Tap(t)
			_, rec := start(t, cfg)
			work := t.TempDir()
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
