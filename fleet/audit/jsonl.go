package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// MaxLine is the longest line of an export, in bytes without the line feed.
const MaxLine = 2 << 20

// MaxImport is the largest number of records that ReadAll keeps.
const MaxImport = 1 << 20

// Line returns r as one line of an export, with the line feed.
func Line(r Record) ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("audit: write record %d: %w", r.Seq, err)
	}
	if len(b) > MaxLine {
		return nil, fmt.Errorf("audit: write record %d: line of %d bytes, at most %d are allowed", r.Seq, len(b), MaxLine)
	}
	return append(b, '\n'), nil
}

// Write writes records as JSON Lines.
func Write(w io.Writer, records []Record) error {
	for _, r := range records {
		b, err := Line(r)
		if err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return fmt.Errorf("audit: write record %d: %w", r.Seq, err)
		}
	}
	return nil
}

// ParseLine reads one line of an export, without its line feed. It takes only
// the bytes that Line writes: another spelling of the same record is refused,
// so that no byte of an export can change unseen.
func ParseLine(line []byte) (Record, error) {
	if len(line) > MaxLine {
		return Record{}, fmt.Errorf("audit: read record: line of %d bytes, at most %d are allowed", len(line), MaxLine)
	}
	var r Record
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		// Not wrapped: an empty line gives io.EOF, which would look like the
		// end of the export.
		return Record{}, fmt.Errorf("audit: read record: %v", err)
	}
	if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, line) {
		return Record{}, errors.New("audit: read record: the line is not in the form of an export")
	}
	return r, nil
}

// Reader reads an export record by record.
type Reader struct {
	s    *bufio.Scanner
	line int
}

// NewReader returns a Reader of JSON Lines. It keeps at most one line.
func NewReader(r io.Reader) *Reader {
	s := bufio.NewScanner(r)
	s.Buffer(nil, MaxLine+1)
	s.Split(wholeLines)
	return &Reader{s: s}
}

// wholeLines is bufio.ScanLines without its tolerance for "\r\n".
func wholeLines(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, errors.New("the last line has no line feed: the file is cut off")
	}
	return 0, nil, nil
}

// Next returns the next record, io.EOF behind the last. It checks the form of
// the line only; whether the chain holds is the business of a Verifier.
func (r *Reader) Next() (Record, error) {
	if !r.s.Scan() {
		if err := r.s.Err(); err != nil {
			return Record{}, fmt.Errorf("audit: read line %d: %w", r.line+1, err)
		}
		return Record{}, io.EOF
	}
	r.line++
	rec, err := ParseLine(r.s.Bytes())
	if err != nil {
		return Record{}, fmt.Errorf("line %d: %w", r.line, err)
	}
	return rec, nil
}

// ReadAll reads at most MaxImport records.
func ReadAll(r io.Reader) ([]Record, error) {
	var records []Record
	for in := NewReader(r); ; {
		rec, err := in.Next()
		if errors.Is(err, io.EOF) {
			return records, nil
		}
		if err != nil {
			return nil, err
		}
		if len(records) == MaxImport {
			return nil, fmt.Errorf("audit: read: more than %d records", MaxImport)
		}
		records = append(records, rec)
	}
}
