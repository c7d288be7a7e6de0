package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peerDir is where `make bench` unpacks programs that must not be installed: a
// package's avahi-daemon would start on this machine's own network.
func peerDir() string {
	if dir := os.Getenv("MUSTER_BENCH_DIR"); dir != "" {
		return filepath.Join(dir, "..", "peers")
	}
	return ".cache/peers"
}

// node is a message bus, avahi-daemon, one published service and a browser
// that goes on, in a mount namespace whose /run is its own. The caller is in
// the network namespace already.
const node = `set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/dbus /run/avahi-daemon
{ cat /etc/passwd; echo avahi:x:0:0::/:/bin/false; } > /run/passwd
{ cat /etc/group; echo avahi:x:0:; } > /run/group
mount --bind /run/passwd /etc/passwd
mount --bind /run/group /etc/group
cat > /run/bus.conf <<'X'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
X
cat > /run/avahi.conf <<X
[server]
host-name=$NAME
use-ipv4=yes
use-ipv6=yes
[publish]
publish-hinfo=no
publish-workstation=no
X
dbus-daemon --config-file=/run/bus.conf --nofork --nopidfile >&2 &
while [ ! -S /run/dbus/system_bus_socket ]; do read -r -t 0.05 _ <> <(:) || :; done
avahi-daemon -f /run/avahi.conf --no-drop-root --no-chroot --no-rlimits --no-proc-title >&2 &
while ! avahi-publish -s "$NAME" _muster._tcp 7445 >&2; do read -r -t 0.05 _ <> <(:) || :; done &
while ! avahi-browse -p -r _muster._tcp 2>/dev/null; do read -r -t 0.05 _ <> <(:) || :; done
`

// avahi runs a node of the peer until ctx ends, and tells whom it resolved.
func avahi(ctx context.Context, name string, heard func(netip.Addr)) error {
	root, err := filepath.Abs(peerDir())
	if err != nil {
		return err
	}
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "bash", "-c", node)
	cmd.Env = append(os.Environ(), "NAME="+name,
		"PATH="+filepath.Join(root, "usr/sbin")+":"+filepath.Join(root, "usr/bin")+":"+os.Getenv("PATH"),
		"LD_LIBRARY_PATH="+filepath.Join(root, "usr/lib/x86_64-linux-gnu"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	log, err := os.CreateTemp("", "avahi-"+name+"-")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start avahi (`make bench PART=discovery` unpacks it): %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
	defer stop()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		// =;interface;protocol;name;type;domain;host;address;port;text
		if f := strings.Split(lines.Text(), ";"); len(f) > 8 && f[0] == "=" && f[3] != name {
			if a, err := netip.ParseAddr(f[7]); err == nil {
				heard(a.Unmap())
			}
		}
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return nil
	}
	said, _ := os.ReadFile(log.Name())
	return errors.Join(fmt.Errorf("avahi of %s ended: %w at %s: %s", name, err, time.Now().Format(time.TimeOnly), said))
}
