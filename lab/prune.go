package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Size returns how many bytes a run's directory takes on disk. What cannot be
// read counts as nothing.
func (r Running) Size() int64 {
	var total int64
	dir := r.Dir
	if at, err := filepath.EvalSymlinks(dir); err == nil {
		dir = at // WalkDir would stop at a link
	}
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			total += onDisk(info)
		}
		return nil
	})
	return total
}

// onDisk is what a file takes: less than its length if it has holes.
func onDisk(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return info.Size()
}

// Prune removes the directories of past runs of this user but the newest
// keep, and returns those that it removed. Runs that are alive stay and do
// not count. Of a run that was given a directory of its own only the entry in
// Home goes: that directory is the user's.
func Prune(keep int) ([]Running, error) {
	if keep < 0 {
		return nil, fmt.Errorf("lab: prune runs: keep %d of them?", keep)
	}
	home, err := Home()
	if err != nil {
		return nil, err
	}
	runs, err := List()
	if err != nil {
		return nil, err
	}
	var removed []Running
	var errs []error
	for _, r := range runs { // newest first
		if r.Alive() {
			continue
		}
		if keep > 0 {
			keep--
			continue
		}
		// List goes by the names in Home; nothing outside it is touched, and
		// RemoveAll follows no links.
		entry := filepath.Join(home, r.Name)
		if filepath.Dir(entry) != home {
			continue
		}
		if err := os.RemoveAll(entry); err != nil {
			errs = append(errs, fmt.Errorf("lab: prune runs: %w", err))
			continue
		}
		removed = append(removed, r)
	}
	return removed, errors.Join(errs...)
}
