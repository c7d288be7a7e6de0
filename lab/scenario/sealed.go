package scenario

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/muster-edge/muster/firmware"
)

// sealed looks at the data partition of a machine that is off, as a thief of
// the disk would: it is LUKS, a key slot is sealed to a TPM, another one is the
// recovery key's, and nothing of what the system wrote can be read.
func (p *pc) sealed() error {
	parts, err := firmware.Layout(diskSize, 512)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(parts, func(x firmware.Partition) bool { return x.Label == firmware.LabelData })
	f, err := os.Open(p.disk)
	if err != nil {
		return fmt.Errorf("scenario: look at the disk: %w", err)
	}
	defer f.Close()
	data := io.NewSectionReader(f, parts[at].Start, parts[at].Size)
	if err := luksTokens(data); err != nil {
		return fmt.Errorf("%s: %w", p.title(), err)
	}
	// Words that a k3s server writes to its disk all the time; in the clear
	// the file system would be full of them.
	words := [][]byte{[]byte("kube-system"), []byte("BEGIN CERTIFICATE"), []byte("kubernetes.io"), []byte("muster/charter")}
	return p.unreadable(f, parts[at], words)
}

// luksTokens reads a LUKS2 header (its JSON area begins at 4096 bytes).
func luksTokens(r io.ReaderAt) error {
	head := make([]byte, 16<<10)
	if _, err := r.ReadAt(head, 0); err != nil {
		return fmt.Errorf("read LUKS header: %w", err)
	}
	if !bytes.HasPrefix(head, []byte("LUKS\xba\xbe\x00\x02")) {
		return errors.New("the data partition has no LUKS2 header: it is not encrypted")
	}
	text := head[4096:]
	if end := bytes.IndexByte(text, 0); end >= 0 {
		text = text[:end]
	}
	var h struct {
		Keyslots map[string]any `json:"keyslots"`
		Tokens   map[string]struct {
			Type string `json:"type"`
			PCRs []int  `json:"tpm2-pcrs"`
		} `json:"tokens"`
	}
	if err := json.Unmarshal(text, &h); err != nil {
		return fmt.Errorf("read LUKS header: %w", err)
	}
	sealed := false
	for _, t := range h.Tokens {
		sealed = sealed || t.Type == "systemd-tpm2" && slices.Equal(t.PCRs, []int{7})
	}
	if !sealed || len(h.Keyslots) != 2 {
		return fmt.Errorf("the data partition has %d key slots, sealed to the TPM: %v (want 2: the TPM's and the recovery key's)", len(h.Keyslots), sealed)
	}
	return nil
}

// unreadable searches the written parts of a partition for words.
func (p *pc) unreadable(f *os.File, part firmware.Partition, words [][]byte) error {
	const piece, overlap = 4 << 20, 64
	var searched int64
	buf := make([]byte, piece+overlap)
	for at := part.Start; at < part.Start+part.Size; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && from >= part.Start+part.Size {
			break
		}
		if err != nil {
			return fmt.Errorf("scenario: search disk: %w", err)
		}
		n, err := f.ReadAt(buf, from)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("scenario: search disk: %w", err)
		}
		for _, w := range words {
			if bytes.Contains(buf[:n], w) {
				return fmt.Errorf("%s: %q can be read in its data partition", p.title(), w)
			}
		}
		searched += int64(min(n, piece))
		at = from + piece
	}
	if searched < 16<<20 {
		return fmt.Errorf("%s: only %d bytes were ever written to its data partition: the search proves nothing", p.title(), searched)
	}
	return nil
}
