package stick

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/enroll"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// maxLists is how many lists a stick may have: one, and others when somebody
// edited it into something that is no list.
const maxLists = 9

// maxProgram bounds the program on the medium that is read to recognise it.
const maxProgram = 256 << 20

// listName is the n-th list, from 0. All fit into a FAT's short names: no
// second directory entry can be lost.
func listName(n int) string {
	if n == 0 {
		return "machines.csv"
	}
	return fmt.Sprintf("machine%d.csv", n+1)
}

// Entry is what the list says of a machine.
type Entry struct {
	fleet.ListedEK
	// Model is for people.
	Model string
}

// outcome is what was done.
type outcome struct {
	file     string
	machines int
	known    bool   // it was on the list already
	dropped  string // why the serial number is not
	spoiled  string // a list that could not be added to
}

// recognise checks that the file system in dir is that of a medium which the
// image builder made: its partition's name follows from the program on it.
func recognise(dir string, guid firmware.GUID) error {
	f, err := os.Open(filepath.Join(dir, "EFI", "BOOT", "BOOTX64.EFI"))
	if errors.Is(err, os.ErrNotExist) {
		return ErrForeign
	}
	if err != nil {
		return fmt.Errorf("read the stick: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, maxProgram+1))
	if err != nil {
		return fmt.Errorf("read the stick: %w", err)
	}
	if n > maxProgram || firmware.MediumOf(firmware.Digest(h.Sum(nil))).Partition != guid {
		return ErrForeign
	}
	return nil
}

// plan says what to append to which list, from what is there.
func plan(dir string, e Entry) (o outcome, old, added []byte, err error) {
	var why error
	for n := range maxLists {
		o.file = listName(n)
		old, err = readList(filepath.Join(dir, o.file))
		if err != nil {
			return o, nil, nil, err
		}
		var list []byte
		list, o.dropped, err = enroll.AppendScan(old, e.ListedEK, e.Model)
		switch {
		case errors.Is(err, enroll.ErrListed):
			o.known, o.machines = true, count(old)
			return o, old, nil, nil
		case err == nil:
			o.machines = count(list)
			return o, old, list[len(old):], nil
		}
		why = err
		if o.spoiled == "" {
			o.spoiled = o.file
		}
	}
	return o, nil, nil, fmt.Errorf("no list on the stick can be added to: %w", why)
}

func count(list []byte) int {
	l := enroll.ParseList(list)
	return len(l.EKs)
}

// readList reads a list; one that is too long is as good as one that is none.
func readList(name string) ([]byte, error) {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the stick: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, enroll.MaxListBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read the stick: %w", err)
	}
	return b, nil
}

// appendList adds bytes to the end of a list and syncs them. What was there
// before is not touched; what could not be added whole is taken back.
func appendList(dir, file string, old, added []byte) error {
	name := filepath.Join(dir, file)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return ErrProtected
	}
	if err != nil {
		return fmt.Errorf("write the stick: %w", err)
	}
	_, err = f.Write(added)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		_ = f.Truncate(int64(len(old)))
	}
	err = errors.Join(err, f.Close())
	switch {
	case errors.Is(err, unix.ENOSPC):
		return errors.New("the stick is full: copy its list, and write the stick anew")
	case errors.Is(err, unix.EROFS):
		return ErrProtected
	case err != nil:
		return fmt.Errorf("write the stick: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("write the stick: %w", err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("write the stick: %w", err)
	}
	return nil
}

// check reads a list back.
func check(dir, file string, old, added []byte) error {
	got, err := readList(filepath.Join(dir, file))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, append(bytes.Clone(old), added...)) {
		return errors.New("the stick did not keep what was written to it: use another stick")
	}
	return nil
}
