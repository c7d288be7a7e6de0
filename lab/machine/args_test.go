package machine

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestArgs(t *testing.T) {
	plain := firmware{code: "/fw/CODE.fd", vars: "/fw/VARS.fd"}
	secure := firmware{code: "/fw/CODE.secboot.fd", vars: "/fw/VARS.snakeoil.fd", smm: true}
	base := Config{Name: "node1", Dir: "/run/lab/node1", MAC: "52:54:00:6d:75:01", Tap: "tap1", UUID: "6d757374-6572-4c61-8000-000000000001", Serial: "LAB-0001"}
	with := func(edit func(*Config)) Config { c := base; edit(&c); return c }
	for _, c := range []struct {
		name string
		cfg  Config
		fw   firmware
		tpm  string
		run  int
	}{
		{"tftp", base, plain, "/run/lab/node1/tpm/tpm.ctrl", 0},
		{"http", with(func(c *Config) { c.Boot = BootHTTP }), plain, "/run/lab/node1/tpm/tpm.ctrl", 0},
		{"secure-boot", with(func(c *Config) { c.SecureBoot = true }), secure, "/run/lab/node1/tpm/tpm.ctrl", 0},
		{"disk-nvme-e1000e-1970", with(func(c *Config) {
			c.Boot, c.NIC, c.Clock, c.MemoryMB, c.CPUs = BootDisk, NICE1000E, time.Unix(0, 0), 2048, 2
			c.Disks = []Disk{{Folder: "/run/lab/stick1", Serial: "STICK", Boot: true}, {File: "/run/lab/target.img", Bus: BusNVMe}}
		}), plain, "", 0},
		{"smbios-disk-first-again", with(func(c *Config) {
			c.SMBIOS = SMBIOS{Product: "a,serial=b\x1b[31m", SKU: "x", BoardProduct: "<b>,,\u202e"}
			c.DiskFirst, c.Disks = true, []Disk{{Folder: "/run/lab/stick1", Boot: true}}
		}), plain, "/run/lab/node1/tpm/tpm.ctrl", 2},
		{"kvm-bare", Config{Name: "probe", Dir: "/p", Accel: AccelKVM, Boot: BootDisk, Disks: []Disk{{Folder: "/p/disk", Boot: true}}}, plain, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := c.cfg.defaults()
			if err := cfg.validate(); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(cfg.args(c.fw, c.tpm, max(c.run, 1)), "\n") + "\n"
			path := filepath.Join("testdata", c.name+".args")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("command line differs from %s (go test -update rewrites it):\n%s", path, got)
			}
		})
	}
}

func TestValidateWhenWrongThenEveryProblemIsNamed(t *testing.T) {
	good := Config{Name: "node1", Dir: "/run/lab/node1", MAC: "52:54:00:6d:75:01", Tap: "tap1"}
	if err := good.defaults().validate(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edit func(*Config)
		want []string
	}{
		"name":               {func(c *Config) { c.Name = "a b" }, []string{"name"}},
		"relative directory": {func(c *Config) { c.Dir = "x" }, []string{"absolute"}},
		"long directory":     {func(c *Config) { c.Dir = "/" + strings.Repeat("x", MaxDir) }, []string{"sockets"}},
		"comma in directory": {func(c *Config) { c.Dir = "/a,b" }, []string{"commas"}},
		"multicast MAC":      {func(c *Config) { c.MAC = "01:00:5e:00:00:01" }, []string{"unicast"}},
		"tap is an option":   {func(c *Config) { c.Tap = "x,script=/bin/sh" }, []string{"interface name"}},
		"e1000e by network":  {func(c *Config) { c.NIC = NICE1000E }, []string{"no driver"}},
		"disk without disk":  {func(c *Config) { c.Boot = BootDisk }, []string{"without a disk"}},
		"no card":            {func(c *Config) { c.Tap = "" }, []string{"without network card"}},
		"serial is option":   {func(c *Config) { c.Serial = "x,uuid=y" }, []string{"serial"}},
		"UUID":               {func(c *Config) { c.UUID = "1" }, []string{"UUID"}},
		"disk is an option":  {func(c *Config) { c.Disks = []Disk{{File: "/x,readonly=on"}} }, []string{"commas"}},
		"file and folder":    {func(c *Config) { c.Disks = []Disk{{File: "/x", Folder: "/y"}} }, []string{"file or a folder"}},
		"bus":                {func(c *Config) { c.Disks = []Disk{{File: "/x", Bus: "ide"}} }, []string{"bus"}},
		"SMBIOS":             {func(c *Config) { c.SMBIOS.BoardAsset = "a\x00b" }, []string{"SMBIOS", "NUL"}},
		"no disk first":      {func(c *Config) { c.DiskFirst = true }, []string{"without a disk"}},
		"two at once":        {func(c *Config) { c.Accel, c.MemoryMB = "magic", 3 }, []string{"accelerator", "memory"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			c.edit(&cfg)
			err := cfg.defaults().validate()
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
		})
	}
}

func TestBootText(t *testing.T) {
	for _, b := range []Boot{BootTFTP, BootHTTP, BootDisk} {
		text, err := b.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back Boot
		if err := back.UnmarshalText(text); err != nil || back != b || string(text) != b.String() {
			t.Errorf("%v became %v (%v)", b, back, err)
		}
	}
	var b Boot
	if err := b.UnmarshalText([]byte("floppy")); err == nil {
		t.Error("floppy: no error")
	}
	if _, err := Boot(9).MarshalText(); err == nil {
		t.Error("Boot(9): no error")
	}
}
