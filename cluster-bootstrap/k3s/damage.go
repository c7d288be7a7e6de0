package k3s

import (
	"bytes"
	"io"
	"os"
	"strings"

	"github.com/muster-edge/muster/cluster-bootstrap/k3s/launch"
)

// damageSigns are what etcd says of data that it cannot use. A datastore that is
// slow or without quorum says none of it.
var damageSigns = []string{
	"walpb: crc mismatch", "wal: crc mismatch", "wal: max entry size limit exceeded", "wal: slice bounds out of range", "failed to read WAL",
	"snap: crc mismatch", "snap: empty snapshot", "failed to recover v3 backend from snapshot", "failed to load snapshot",
	"failed initial corruption check", "found data inconsistency with peers", "checksum mismatch", "detected corrupted revision",
	"invalid database", "freelist: ", "file size too small", "data corruption",
}

const (
	damageTail = 128 << 10
	maxDamage  = 200
)

// damage looks through the log of the last two runs of k3s, the one before
// included since the last may not have come that far yet. Only asked while the
// datastore does not answer.
func damage(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > damageTail {
		if _, err := f.Seek(-damageTail, io.SeekEnd); err != nil {
			return ""
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, damageTail))
	if err != nil {
		return ""
	}
	return findDamage(b)
}

func findDamage(b []byte) string {
	if i := bytes.LastIndex(b, []byte(launch.StartMark)); i > 0 {
		if j := bytes.LastIndex(b[:i], []byte(launch.StartMark)); j >= 0 {
			b = b[j:]
		}
	}
	for line := range strings.Lines(string(b)) {
		// Only lines by which a process ends say that it could not go on.
		if !strings.Contains(line, "fatal") && !strings.Contains(line, "panic") && !strings.Contains(line, "Fatal") {
			continue
		}
		for _, d := range damageSigns {
			if i := strings.Index(line, d); i >= 0 {
				line = strings.ToValidUTF8(strings.TrimSpace(line[i:]), "?")
				return line[:min(len(line), maxDamage)]
			}
		}
	}
	return ""
}
