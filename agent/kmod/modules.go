package kmod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Loader loads kernel modules for devices, each module once.
type Loader struct {
	dir   string // /lib/modules/VERSION
	index *moduleIndex
	log   *slog.Logger
	// insert is finit_module; tests replace it.
	insert func(file string) error

	mu   sync.Mutex
	done map[string]error // by file
}

// NewLoader reads the lists of the running kernel. An image without modules
// (everything built in) gives a loader that loads nothing, and the error.
func NewLoader(log *slog.Logger) (*Loader, error) {
	l := &Loader{log: log, done: map[string]error{}, index: &moduleIndex{}, insert: insertModule}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return l, fmt.Errorf("kmod: read kernel version: %w", err)
	}
	l.dir = filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:]))
	dep, err := readCapped(filepath.Join(l.dir, "modules.dep"), maxModuleFile+1)
	if err != nil {
		return l, fmt.Errorf("kmod: read modules.dep: %w", err)
	}
	aliases, err := readCapped(filepath.Join(l.dir, "modules.alias"), maxModuleFile+1)
	if err != nil {
		return l, fmt.Errorf("kmod: read modules.alias: %w", err)
	}
	x, err := parseModules(dep, aliases)
	if err != nil {
		return l, err
	}
	l.index = x
	return l, nil
}

func insertModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// Device loads what a modalias asks for.
func (l *Loader) Device(modalias string) {
	for _, name := range l.index.lookup(modalias) {
		if err := l.Module(name); err != nil {
			l.log.Debug("module", "name", name, "err", err)
		}
	}
}

// Module loads a module and what it needs. One that is loaded already, or
// was tried before, is no work.
func (l *Loader) Module(name string) error {
	files, err := l.index.closure(name)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range files {
		err, tried := l.done[f]
		if !tried {
			err = l.insert(filepath.Join(l.dir, f))
			if errors.Is(err, unix.EEXIST) {
				err = nil
			}
			l.done[f] = err
			l.log.Info("module", "file", filepath.Base(f), "err", err)
		}
		// ENODEV: a driver that found nothing to drive. Modules above it may
		// still load; they say so themselves if not.
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("kmod: load module %s: %w", filepath.Base(f), err)
		}
	}
	return nil
}

// Count is the number of modules that are loaded.
func (l *Loader) Count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, err := range l.done {
		if err == nil {
			n++
		}
	}
	return n
}

// maxDevices bounds the walk through /sys/devices.
const maxDevices = 100000

// Coldplug serves the devices that were there before the first Event was
// listened to.
func (l *Loader) Coldplug(ctx context.Context, sysDevices string) {
	seen := 0
	err := filepath.WalkDir(sysDevices, func(p string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if seen++; seen > maxDevices {
			return fs.SkipAll
		}
		if err != nil || d.IsDir() || d.Name() != "modalias" {
			return nil // devices vanish during the walk: their rest goes on
		}
		if b, err := readCapped(p, maxAlias+1); err == nil {
			l.Device(strings.TrimSpace(string(b)))
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		l.log.Warn("coldplug", "err", err)
	}
}

// readCapped reads at most limit bytes of a file.
func readCapped(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
