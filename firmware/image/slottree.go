package image

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-edge/muster/examples/systemd"
	"github.com/muster-edge/muster/firmware"
)

// slotRecipe counts changes of how a slot is put together: the same inputs
// under another recipe are another image.
const slotRecipe = 1

//go:embed slot_modules.txt
var slotModulesText string

//go:embed all:slotfs
var slotFS embed.FS

// treeFile is one file that we put into the root.
type treeFile struct {
	path string // relative, slashes
	mode fs.FileMode
	data []byte
}

// overlayFiles are our files in every slot, sorted: the system's settings, and
// the node's units as they are in examples/systemd.
func overlayFiles() ([]treeFile, error) {
	var out []treeFile
	add := func(fsys fs.FS, from, to string) error {
		return fs.WalkDir(fsys, from, func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := fs.ReadFile(fsys, p)
			out = append(out, treeFile{path.Join(to, strings.TrimPrefix(strings.TrimPrefix(p, from), "/")), 0o644, data})
			return err
		})
	}
	if err := errors.Join(add(slotFS, "slotfs", ""), add(systemd.Units, ".", "etc/systemd/system")); err != nil {
		return nil, fmt.Errorf("image: read settings: %w", err)
	}
	slices.SortFunc(out, func(a, b treeFile) int { return strings.Compare(a.path, b.path) })
	return out, nil
}

// enabled are the units that start by themselves. muster-k3s does not: the
// agent decides.
var enabled = map[string][]string{
	"multi-user.target.wants": {
		"muster-data.service", "muster-agent.service", "muster-started.service",
		"var-lib-rancher.mount", "var-lib-kubelet.mount", "var-lib-cni.mount", "etc-rancher.mount",
		"systemd-networkd.service", "systemd-resolved.service", "chrony.service",
	},
	"sockets.target.wants": {"systemd-networkd.socket"},
	"timers.target.wants":  {"muster-trial.timer"},
}

// masked are units that must not run, each with its reason.
var masked = []string{
	// They extend PCR 11: what the TPM shows would no longer be the image.
	"systemd-pcrphase.service", "systemd-pcrphase-initrd.service", "systemd-pcrphase-sysinit.service",
	// Nobody logs in at a slot.
	"getty@.service", "serial-getty@.service", "console-getty.service", "container-getty@.service", "debug-shell.service",
	"rescue.service",
	// They would change what is fixed.
	"systemd-firstboot.service", "systemd-update-done.service", "systemd-machine-id-commit.service", "systemd-boot-system-token.service",
	"systemd-hwdb-update.service", "ldconfig.service", "systemd-sysusers.service", "systemd-networkd-wait-online.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
	"systemd-network-generator.service", "systemd-timesyncd.service", "cryptdisks.service", "cryptdisks-early.service",
}

// dropped is what a slot needs no more, relative to the root; a name that ends
// in /* empties a folder.
var dropped = []string{
	"dev/*", "boot/*", "var/*", "tmp/*", "run/*", "usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian",
	"usr/share/bash-completion", "usr/share/zsh", "usr/share/menu", "usr/share/polkit-1", "usr/lib/udev/hwdb.d", "usr/lib/apt", "usr/bin/apt", "usr/bin/apt-get", "usr/bin/apt-cache",
	"usr/bin/apt-mark", "usr/bin/apt-key", "usr/bin/apt-cdrom", "usr/bin/apt-config", "etc/apt", "etc/cron.d", "etc/cron.daily", "etc/.pwd.lock",
	"etc/hostname", "etc/machine-id", "etc/resolv.conf", "etc/passwd-", "etc/shadow-", "etc/group-", "etc/gshadow-", "etc/ld.so.cache~",
	"etc/chrony/chrony.keys", "etc/motd", "etc/issue", "etc/issue.net", "etc/update-motd.d",
}

// base runs mmdebstrap over the locked packages and nothing else, and keeps the
// result: the slowest step, the same for all images with one lock.
func (b *slotBuild) base(ctx context.Context) error {
	system := b.system()
	h := digestOf([]byte(fmt.Sprint(slotRecipe, b.epoch(), system)))
	b.basePath = filepath.Join(b.cfg.CacheDir, "slot-base-"+h.String()[:16]+".tar")
	if _, err := os.Stat(b.basePath); err == nil {
		b.cfg.Note("taking the base system from %s", b.basePath)
		return nil
	}
	b.cfg.Note("installing %d packages into a new root (minutes)", len(system))
	repo := filepath.Join(b.tmp, "repo")
	if err := os.Mkdir(repo, 0o755); err != nil {
		return err
	}
	var index bytes.Buffer
	var names []string
	for _, p := range system {
		deb := b.debs.path(p)
		control, err := b.debs.run(ctx, "", "dpkg-deb", "-f", deb)
		if err != nil {
			return fmt.Errorf("image: read %s: %w", filepath.Base(deb), err)
		}
		if f := controlFields(string(control)); f["Package"] != p.Name || f["Version"] != p.Version {
			return fmt.Errorf("image: %s says it is %s %s", filepath.Base(deb), f["Package"], f["Version"])
		}
		info, err := os.Stat(deb)
		if err != nil {
			return err
		}
		// A name without the characters that apt would escape.
		name := fmt.Sprintf("%s_%s.deb", p.Name, p.SHA256.String()[:16])
		if err := os.Symlink(deb, filepath.Join(repo, name)); err != nil {
			return err
		}
		fmt.Fprintf(&index, "%s\nFilename: ./%s\nSize: %d\nSHA256: %s\n\n", bytes.TrimSpace(control), name, info.Size(), p.SHA256)
		names = append(names, p.Name)
	}
	if err := os.WriteFile(filepath.Join(repo, "Packages"), index.Bytes(), 0o644); err != nil {
		return err
	}
	part := b.basePath + ".part"
	args := []string{"--mode=root", "--variant=apt", "--architectures=amd64", "--format=tar", "--quiet",
		"--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
		"--aptopt=APT::Install-Recommends \"false\"", "--aptopt=APT::Sandbox::User \"root\"", "--dpkgopt=force-unsafe-io"}
	for _, p := range []string{"man", "doc", "info", "locale"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+p+"/*")
	}
	args = append(args, "--include="+strings.Join(names, ","), "bookworm", part,
		// Trusted: every file was compared with the lock's digest.
		"deb [trusted=yes] copy://"+repo+" ./")
	cmd := exec.CommandContext(ctx, "mmdebstrap", args...)
	cmd.Dir = b.tmp
	// Nothing of the builder's surroundings gets in but the way to tools.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "SOURCE_DATE_EPOCH=" + b.epoch(), "TMPDIR=" + b.tmp}
	var problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &problem, &problem
	if err := cmd.Run(); err != nil {
		_ = os.Remove(part)
		return fmt.Errorf("image: install packages: mmdebstrap: %w: %s", err, lastLines(problem.String(), 5))
	}
	return os.Rename(part, b.basePath)
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// tree unpacks the base and makes a slot of it.
func (b *slotBuild) tree(ctx context.Context) error {
	b.cfg.Note("putting the root together")
	b.rootDir = filepath.Join(b.tmp, "tree")
	if err := os.Mkdir(b.rootDir, 0o755); err != nil {
		return err
	}
	if _, err := b.debs.run(ctx, "", "tar", "-C", b.rootDir, "--numeric-owner", "--exclude=./dev/*", "-xpf", b.basePath); err != nil {
		return fmt.Errorf("image: unpack base: %w", err)
	}
	status, err := os.ReadFile(filepath.Join(b.rootDir, "var/lib/dpkg/status"))
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if err := b.billOfPackages(status); err != nil {
		return err
	}
	if err := drop(b.rootDir); err != nil {
		return err
	}
	if err := b.modules(ctx); err != nil {
		return err
	}
	overlay, err := overlayFiles()
	if err != nil {
		return err
	}
	overlay = append(append(overlay, b.cfg.extra...),
		treeFile{"usr/lib/os-release", 0o644, []byte(slotOSRelease(b.cfg.Name, b.cfg.Version))},
		treeFile{"usr/share/muster/dpkg-status", 0o644, status},
		treeFile{"usr/local/bin/muster-node", 0o755, b.node},
		// Empty: a start without a name of its own makes one up and forgets it.
		treeFile{"etc/machine-id", 0o444, nil},
		treeFile{"etc/hostname", 0o644, []byte("muster\n")},
		treeFile{"etc/fstab", 0o644, []byte("# Slots are mounted by the initrd, data by muster-data.service.\n")},
	)
	for _, f := range overlay {
		if err := b.put(f); err != nil {
			return err
		}
	}
	copies := map[string]string{}
	if b.cfg.K3s != "" {
		copies["usr/local/bin/k3s"] = b.cfg.K3s
	}
	for _, f := range b.cfg.Airgap {
		copies["usr/share/muster/images/"+filepath.Base(f)] = f
	}
	for to, from := range copies {
		to = filepath.Join(b.rootDir, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := copyFile(from, to); err != nil {
			return fmt.Errorf("image: copy %s: %w", from, err)
		}
		if err := os.Chmod(to, 0o755); err != nil {
			return err
		}
	}
	return errors.Join(b.links(), noSecrets(b.rootDir))
}

// drop removes what a slot does not need.
func drop(root string) error {
	for _, d := range dropped {
		if dir, ok := strings.CutSuffix(d, "/*"); ok {
			all, err := os.ReadDir(filepath.Join(root, dir))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("image: %w", err)
			}
			for _, e := range all {
				if err := os.RemoveAll(filepath.Join(root, dir, e.Name())); err != nil {
					return fmt.Errorf("image: %w", err)
				}
			}
			continue
		}
		if err := os.RemoveAll(filepath.Join(root, d)); err != nil {
			return fmt.Errorf("image: %w", err)
		}
	}
	return nil
}

// modules puts all modules of the kernel into the root: what a site plugs in
// one day is not known here.
func (b *slotBuild) modules(ctx context.Context) error {
	dir := filepath.Join(b.tmp, "kernel")
	if _, err := b.debs.run(ctx, "", "dpkg-deb", "-x", b.kernelDeb, dir); err != nil {
		return fmt.Errorf("image: unpack kernel: %w", err)
	}
	to := filepath.Join(b.rootDir, "usr/lib/modules")
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(dir, "lib/modules", b.kernel.release), filepath.Join(to, b.kernel.release)); err != nil {
		return fmt.Errorf("image: kernel modules: %w", err)
	}
	for _, l := range []string{"build", "source"} {
		_ = os.Remove(filepath.Join(to, b.kernel.release, l))
	}
	if _, err := b.debs.run(ctx, "", "depmod", "-b", b.rootDir, b.kernel.release); err != nil {
		return fmt.Errorf("image: kernel modules: %w", err)
	}
	return nil
}

func (b *slotBuild) put(f treeFile) error {
	to := filepath.Join(b.rootDir, f.path)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	// A link of a package is replaced, not followed.
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if f.mode == fs.ModeSymlink {
		return os.Symlink(string(f.data), to)
	}
	if err := os.WriteFile(to, f.data, f.mode); err != nil {
		return err
	}
	return os.Chmod(to, f.mode)
}

// links enables and masks units and points at what lies elsewhere.
func (b *slotBuild) links() error {
	links := map[string]string{
		"etc/resolv.conf":                   "../run/systemd/resolve/resolv.conf",
		"etc/localtime":                     "/usr/share/zoneinfo/Etc/UTC",
		"etc/mtab":                          "../proc/self/mounts",
		"etc/systemd/system/default.target": "/lib/systemd/system/multi-user.target",
	}
	start := maps.Clone(enabled)
	start["muster-started.service.wants"] = b.cfg.extraUnits
	for target, units := range start {
		for _, u := range units {
			from := "/lib/systemd/system/" + u
			if _, err := os.Stat(filepath.Join(b.rootDir, "etc/systemd/system", u)); err == nil {
				from = "/etc/systemd/system/" + u
			} else if _, err := os.Stat(filepath.Join(b.rootDir, "usr/lib/systemd/system", u)); err != nil {
				return fmt.Errorf("image: unit %s is to be enabled and is not there", u)
			}
			links["etc/systemd/system/"+target+"/"+u] = from
		}
	}
	for _, u := range masked {
		links["etc/systemd/system/"+u] = "/dev/null"
	}
	for name, to := range links {
		at := filepath.Join(b.rootDir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		if err := os.RemoveAll(at); err != nil {
			return err
		}
		if err := os.Symlink(to, at); err != nil {
			return err
		}
	}
	// Mount points of the running system.
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "var", "etc/rancher"} {
		if err := os.MkdirAll(filepath.Join(b.rootDir, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// maxSearched is the size up to which files are searched for secrets.
const maxSearched = 1 << 20

// noSecrets wants no private key and no password in the tree: everybody who
// gets an image may read it.
func noSecrets(root string) error {
	var problems []error
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() > maxSearched {
			return err
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		// Libraries hold the words that they look for.
		if !bytes.HasPrefix(data, []byte("\x7fELF")) && bytes.Contains(data, []byte("PRIVATE KEY-----")) {
			problems = append(problems, fmt.Errorf("image: %s holds a private key", rel))
		}
		if rel == "etc/shadow" {
			for line := range strings.Lines(string(data)) {
				if f := strings.Split(line, ":"); len(f) > 1 && strings.Trim(f[1], "!*") != "" {
					problems = append(problems, fmt.Errorf("image: user %.40q has a password", f[0]))
				} else if len(f) > 1 && f[1] == "" {
					problems = append(problems, fmt.Errorf("image: user %.40q needs no password", f[0]))
				}
			}
		}
		return nil
	})
	return errors.Join(append(problems, err)...)
}

// treeSize adds up the files below dir.
func treeSize(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				n += info.Size()
			}
		}
		return nil
	})
	return n
}

// billOfPackages lists what dpkg installed, and wants it to be the lock.
func (b *slotBuild) billOfPackages(status []byte) error {
	want := map[string]Package{}
	for _, p := range b.system() {
		want[p.Name] = p
	}
	for _, stanza := range strings.Split(string(status), "\n\n") {
		f := controlFields(stanza)
		if f["Package"] == "" {
			continue
		}
		p, ok := want[f["Package"]]
		if !ok || p.Version != f["Version"] || f["Status"] != "install ok installed" {
			return fmt.Errorf("image: the base has %s %s (%s), which the lock does not name", f["Package"], f["Version"], f["Status"])
		}
		delete(want, p.Name)
		b.components = append(b.components, debian(p, f["Architecture"]))
	}
	for name := range want {
		return fmt.Errorf("image: the base lacks %s of the lock", name)
	}
	return nil
}

func debian(p Package, arch string) component {
	return component{Name: p.Name, Version: p.Version, Hashes: hashes(p.SHA256),
		PURL: fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", p.Name, strings.ReplaceAll(p.Version, "+", "%2B"), arch)}
}

func hashes(d firmware.Digest) []componentHash { return []componentHash{{"SHA-256", d.String()}} }
