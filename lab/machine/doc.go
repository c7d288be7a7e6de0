// Package machine runs one virtual PC from power-on: QEMU with UEFI firmware
// (OVMF), a software TPM (swtpm) and a network card on a given tap.
//
// It knows nothing of muster's own services: it builds command lines, follows
// the serial console, speaks QMP and ends what it started. Networks, image
// servers and what a scenario expects live in the packages above it.
package machine
