// Package bootmodel says what a machine will start: the firmware's boot order
// and the choice of systemd-boot (252 and 257 alike) as pure functions over the files of an
// EFI system partition and the firmware's variables. The node uses it to look
// before it leaps (a change of the ESP is judged by what every later power-on
// would start), tests use it to judge thousands of power cuts.
//
// It models what muster uses: unified kernel images below \EFI\Linux, boot
// counting in file names, one-shot and default choices, no Type #1 entries, no
// profiles, no auto-discovered other systems. Each rule was compared with the
// real program in a virtual machine (TestRealLoader), which repeats the
// comparison for the loader at hand.
package bootmodel
