// Package kmod finds the kernel modules that a machine's devices ask for, and
// loads them: by the lists that the image builder wrote, without modprobe or
// udev. The init of every image of ours uses it.
package kmod
