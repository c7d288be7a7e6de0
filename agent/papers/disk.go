package papers

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/muster-edge/muster/internal/failpoint"
	"github.com/muster-edge/muster/internal/flush"
)

// maxFiles bounds what Open reads: everything that can be held, twice.
const maxFiles = 2 * (MaxFacts + 2*MaxOrders + MaxRecords + 1)

// readAll reads every document in dir and removes what a power cut left of
// files that were not finished. Files are told by their names, not believed.
func readAll(dir string) ([][]byte, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("papers: read directory: %w", err)
	}
	var out [][]byte
	for _, n := range names {
		name := filepath.Join(dir, n.Name())
		switch {
		case !n.Type().IsRegular():
		case strings.HasPrefix(n.Name(), "."):
			// Unfinished: nobody was told of it. A failure to remove it is a
			// failure to tidy up, no more.
			_ = os.Remove(name)
		case strings.HasSuffix(n.Name(), suffix) && len(out) < maxFiles:
			b, err := readFile(name)
			if err != nil {
				return nil, fmt.Errorf("papers: read document: %w", err)
			}
			out = append(out, b)
		}
	}
	return out, nil
}

// readFile reads no more than tells that a file is too large.
func readFile(name string) (_ []byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return io.ReadAll(io.LimitReader(f, MaxEnvelope+1))
}

// flush makes dir hold what s holds, given that it holds what before held. It
// writes in the order in which documents vouch for each other, and removes
// nothing before all that is new is safe: a cut in between leaves documents
// that are each good, and none less than were acknowledged.
func (s *set) flush(dir string, before *set) error {
	var wrote bool
	for _, file := range inOrder(s) {
		d := s.docs[file]
		if before.docs[file] == d {
			continue
		}
		if err := write(filepath.Join(dir, file), d.envelope); err != nil {
			return fmt.Errorf("papers: write %s: %w", file, err)
		}
		wrote = true
	}
	if wrote {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	failpoint.Hit("papers/flushed")
	for _, file := range slices.Sorted(maps.Keys(before.docs)) {
		if s.docs[file] != nil {
			continue
		}
		failpoint.Hit("papers/before-remove")
		if err := os.Remove(filepath.Join(dir, file)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("papers: remove %s: %w", file, err)
		}
	}
	// That a removal is not flushed does no harm: Open comes to the same.
	return nil
}

// inOrder returns the files of s: charter, admissions, removals, records,
// orders.
func inOrder(s *set) []string {
	rank := func(file string) int {
		for i, p := range []string{charterFile, admissionPrefix, removalPrefix, recordPrefix} {
			if strings.HasPrefix(file, p) {
				return i
			}
		}
		return 4
	}
	files := slices.Sorted(maps.Keys(s.docs))
	slices.SortStableFunc(files, func(a, b string) int { return rank(a) - rank(b) })
	return files
}

func write(name string, b []byte) error {
	f, err := renameio.NewPendingFile(name, renameio.WithTempDir(filepath.Dir(name)), renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	failpoint.Hit("papers/before-write")
	if _, err := f.Write(b); err != nil {
		return errors.Join(err, f.Cleanup())
	}
	failpoint.Hit("papers/before-rename")
	if err := f.CloseAtomicallyReplace(); err != nil {
		return errors.Join(err, f.Cleanup())
	}
	failpoint.Hit("papers/after-rename")
	return nil
}

func syncDir(dir string) error {
	if err := flush.Dir(dir); err != nil {
		return fmt.Errorf("papers: %w", err)
	}
	return nil
}
