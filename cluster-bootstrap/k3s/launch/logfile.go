package launch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
)

// rotate bounds the log at about files times size. k3s holds the file open
// for appending and outlives the launcher, so that the content is copied away
// and the file emptied; lines written in between are lost.
func rotate(path string, size int64, files int) error {
	fi, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("launch: rotate log: %w", err)
	}
	if fi.Size() < size {
		return nil
	}
	for i := files - 2; i >= 1; i-- {
		if err := os.Rename(path+"."+strconv.Itoa(i), path+"."+strconv.Itoa(i+1)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("launch: rotate log: %w", err)
		}
	}
	if files > 1 {
		if err := copyTail(path, path+".1", fi.Size(), size); err != nil {
			return err
		}
	}
	if err := os.Truncate(path, 0); err != nil {
		return fmt.Errorf("launch: rotate log: %w", err)
	}
	return nil
}

// copyTail copies at most the last size bytes.
func copyTail(from, to string, have, size int64) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("launch: rotate log: %w", err)
	}
	defer in.Close()
	if have > size {
		if _, err := in.Seek(have-size, io.SeekStart); err != nil {
			return fmt.Errorf("launch: rotate log: %w", err)
		}
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("launch: rotate log: %w", err)
	}
	_, err = io.CopyN(out, in, min(have, size))
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("launch: rotate log: %w", err)
	}
	return nil
}
