// Package image builds the images that machines boot. The recovery image is
// one UEFI program, a unified kernel image: the stub of systemd, Debian's
// kernel, and an initrd with muster-node as /init, the kernel modules and
// site.json. The same inputs give the same bytes on every build host.
//
// Packages are downloaded and unpacked, never installed; nothing runs as part
// of the build but apt, dpkg-deb and, for Secure Boot, sbsign.
package image
