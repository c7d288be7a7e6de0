// Package install puts a system on the disk of a machine in recovery: it
// gathers what is known of order, image and disk, asks firmware.PlanInstall
// what to do next, does that, and asks again. All that it has to remember is on
// the disk that it installs, in the record on the meta partition, so that a
// power cut costs at most a chunk of the image.
//
// It touches no disk but the one that a verified order names, and that one only
// while nobody else has it open. It knows neither TPM nor centre: orders come
// verified (agent/papers), images are believed by their digests.
package install
