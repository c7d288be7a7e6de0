// Package firmware holds what a machine boots, as values: the manifest of an
// image, the measurements a machine running that image must show, and the
// reading of the PE files that firmware loads. It is the pure core of the
// firmware folder; image (the build), secureboot (keys), and later disk and efi,
// are its edges.
//
// Everything in here works on bytes and values handed in by the caller. The
// node, the centre and the build host all use the same functions, so that what
// the build promises is computed by the same code that later checks it.
package firmware
