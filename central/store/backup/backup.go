// Package backup writes all rows of a centre's database to one file and reads
// them into an empty one, on either engine. The file is one consistent moment:
// it is read in one snapshot while the centre serves.
//
// It is gzip over lines of JSON: a Header, then for each table a line that
// names it and one array per row, then files (keys, only when asked for), then
// a last line with the number of rows and the SHA-256 of everything before it.
// Verify reads all of that before Load believes any of it.
package backup

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/central/store/tables"
)

// Format is the first thing in a backup.
const Format = "muster backup 1"

// Bounds of what is read.
const (
	maxLine  = 64 << 20
	maxFiles = 10000
)

var (
	// ErrDamaged: the file is cut off, changed, or none of ours.
	ErrDamaged = errors.New("backup: the file is damaged or no backup of a muster centre")
	// ErrNotEmpty: there is something in the database already.
	ErrNotEmpty = errors.New("backup: the database is not empty")
)

// Header says what a backup is of.
type Header struct {
	Format  string    `json:"format"`
	Created time.Time `json:"created"`
	// Engine it was read from.
	Engine string `json:"engine"`
	// Schema are the numbers of the migrations that were applied.
	Schema []int64 `json:"schema"`
	// Epoch of the database.
	Epoch uint64 `json:"epoch"`
	// Program that wrote it.
	Program string `json:"program,omitempty"`
	// Keys: the keys of the centre are inside.
	Keys bool `json:"keys"`
}

// File is a file that goes with the rows.
type File struct {
	Name string `json:"file"`
	Data []byte `json:"data"`
}

type tableLine struct {
	Table   string   `json:"table"`
	Columns []string `json:"columns"`
}

type endLine struct {
	End    bool   `json:"end"`
	Rows   int64  `json:"rows"`
	SHA256 string `json:"sha256"`
}

// Summary is what was written, or found to be sound.
type Summary struct {
	Header
	Tables int   `json:"tables"`
	Rows   int64 `json:"rows"`
	Files  int   `json:"files"`
}

// Write writes a backup of one snapshot of the database. h.Schema and h.Epoch
// are filled in.
func Write(ctx context.Context, w io.Writer, from tables.Raw, h Header, files []File) (Summary, error) {
	out := Summary{}
	z := gzip.NewWriter(w)
	sum := sha256.New()
	b := bufio.NewWriterSize(io.MultiWriter(z, sum), 1<<20)
	line := func(v any) error {
		text, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if len(text) >= maxLine {
			return fmt.Errorf("backup: write: a row of %d bytes, at most %d are possible", len(text), maxLine)
		}
		_, err = b.Write(append(text, '\n'))
		return err
	}
	err := from.Read(ctx, func(t tables.DBTX) error {
		var err error
		h.Format, h.Engine, h.Keys = Format, from.Engine(), len(files) > 0
		if h.Schema, err = schema(ctx, t); err != nil {
			return err
		}
		var epoch string
		if err := t.QueryRowContext(ctx, "SELECT value FROM settings WHERE name = 'epoch'").Scan(&epoch); err != nil {
			return fmt.Errorf("backup: read epoch: %w", err)
		}
		if h.Epoch, err = strconv.ParseUint(epoch, 10, 64); err != nil {
			return fmt.Errorf("backup: read epoch: %w", err)
		}
		out.Header = h
		if err := line(h); err != nil {
			return err
		}
		names, err := list(ctx, t, from)
		if err != nil {
			return err
		}
		out.Tables = len(names)
		for _, name := range names {
			n, err := writeTable(ctx, t, name, line)
			if err != nil {
				return fmt.Errorf("backup: write table %s: %w", name, err)
			}
			out.Rows += n
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	for _, f := range files {
		if err := line(f); err != nil {
			return out, err
		}
		out.Files++
	}
	if err := b.Flush(); err != nil {
		return out, fmt.Errorf("backup: write: %w", err)
	}
	if err := line(endLine{End: true, Rows: out.Rows, SHA256: hex.EncodeToString(sum.Sum(nil))}); err != nil {
		return out, err
	}
	if err := errors.Join(b.Flush(), z.Close()); err != nil {
		return out, fmt.Errorf("backup: write: %w", err)
	}
	return out, nil
}

func schema(ctx context.Context, t tables.DBTX) ([]int64, error) {
	rows, err := t.QueryContext(ctx, "SELECT DISTINCT version_id FROM goose_db_version WHERE version_id > 0 ORDER BY version_id")
	if err != nil {
		return nil, fmt.Errorf("backup: read schema: %w", err)
	}
	defer rows.Close()
	var out []int64
	for rows.Next() {
		var n int64
		if err := rows.Scan(&n); err != nil {
			return nil, fmt.Errorf("backup: read schema: %w", err)
		}
		out = append(out, n)
	}
	return out, rows.Err()
}

// local are tables that mean nothing to another database: goose writes the
// first, the second is a log for processes that run now.
var local = []string{"goose_db_version", "changes"}

func list(ctx context.Context, t tables.DBTX, raw tables.Raw) ([]string, error) {
	rows, err := t.QueryContext(ctx, raw.TableList())
	if err != nil {
		return nil, fmt.Errorf("backup: list tables: %w", err)
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, fmt.Errorf("backup: list tables: %w", err)
		}
		if !slices.Contains(local, name) && plainName(name) {
			out = append(out, name)
		}
	}
	return out, rows.Err()
}

func plainName(s string) bool {
	return s != "" && len(s) < 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz_0123456789") == ""
}

func writeTable(ctx context.Context, t tables.DBTX, name string, line func(any) error) (int64, error) {
	rows, err := t.QueryContext(ctx, "SELECT * FROM "+name)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return 0, err
	}
	if err := line(tableLine{name, columns}); err != nil {
		return 0, err
	}
	values, into := make([]any, len(columns)), make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	n := int64(0)
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return n, err
		}
		for i, v := range values {
			switch v := v.(type) {
			case []byte:
				values[i] = string(v)
			case string, int64:
			default:
				return n, fmt.Errorf("column %s holds a %T: tables have text and numbers only", columns[i], v)
			}
		}
		if err := line(values); err != nil {
			return n, err
		}
		n++
	}
	return n, rows.Err()
}

// reader takes a backup apart, line by line.
type reader struct {
	lines *bufio.Reader
	sum   hash.Hash
	head  Header
	rows  int64
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

func open(r io.Reader) (*reader, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, damaged("%w", err)
	}
	d := &reader{lines: bufio.NewReaderSize(z, 1<<20), sum: sha256.New()}
	first, err := d.line()
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(first, &d.head); err != nil || !strings.HasPrefix(d.head.Format, "muster backup ") {
		return nil, damaged("it does not begin like one")
	}
	if d.head.Format != Format {
		return nil, fmt.Errorf("backup: read: the file has the format %.40q, this muster reads %q: use a newer one", d.head.Format, Format)
	}
	return d, nil
}

func (d *reader) line() ([]byte, error) {
	var whole []byte
	for {
		part, err := d.lines.ReadSlice('\n')
		whole = append(whole, part...)
		switch {
		case err == nil:
			return whole, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, damaged("it ends too early: %w", err)
		case len(whole) > maxLine:
			return nil, damaged("a line of more than %d bytes", maxLine)
		}
		if len(whole) > maxLine {
			return nil, damaged("a line of more than %d bytes", maxLine)
		}
	}
}

// each calls the functions with what is inside, in its order, and checks the
// end.
func (d *reader) each(head []byte, table func(tableLine) error, row func([]any) error, file func(File) error) error {
	d.sum.Write(head)
	columns := -1
	for files := 0; ; {
		text, err := d.line()
		if err != nil {
			return err
		}
		if text[0] == '[' {
			dec := json.NewDecoder(bytes.NewReader(text))
			dec.UseNumber()
			var values []any
			if err := dec.Decode(&values); err != nil || len(values) != columns {
				return damaged("row %d is none", d.rows)
			}
			for i, v := range values {
				switch v := v.(type) {
				case string:
				case json.Number:
					if values[i], err = v.Int64(); err != nil {
						return damaged("row %d: %w", d.rows, err)
					}
				default:
					return damaged("row %d holds a %T", d.rows, v)
				}
			}
			d.rows++
			d.sum.Write(text)
			if err := row(values); err != nil {
				return err
			}
			continue
		}
		var any struct {
			tableLine
			File
			endLine
		}
		if err := json.Unmarshal(text, &any); err != nil {
			return damaged("%w", err)
		}
		switch {
		case any.End:
			if any.Rows != d.rows || any.endLine.SHA256 != hex.EncodeToString(d.sum.Sum(nil)) {
				return damaged("its content is not what was written")
			}
			// gzip's own check comes with the end of the stream.
			if _, err := d.lines.ReadByte(); !errors.Is(err, io.EOF) {
				return damaged("something follows the end: %v", err)
			}
			return nil
		case any.Table != "":
			if !plainName(any.Table) || slices.Contains(local, any.Table) || slices.ContainsFunc(any.Columns, func(c string) bool { return !plainName(c) }) {
				return damaged("a table %.40q", any.Table)
			}
			columns = len(any.Columns)
			err = table(any.tableLine)
		case any.Name != "":
			if files++; files > maxFiles || path.Clean(any.Name) != any.Name || path.IsAbs(any.Name) || strings.HasPrefix(any.Name, "..") {
				return damaged("a file %.80q", any.Name)
			}
			columns = -1
			err = file(any.File)
		default:
			return damaged("a line that is nothing")
		}
		if err != nil {
			return err
		}
		d.sum.Write(text)
	}
}

// Verify reads a backup to its end and says what is in it. An error is
// ErrDamaged unless reading failed.
func Verify(r io.Reader) (Summary, error) {
	var out Summary
	d, head, err := start(r)
	if err != nil {
		return out, err
	}
	err = d.each(head, func(tableLine) error { out.Tables++; return nil }, func([]any) error { return nil }, func(File) error { out.Files++; return nil })
	out.Header, out.Rows = d.head, d.rows
	return out, err
}

// start opens a backup and returns its first line, too.
func start(r io.Reader) (*reader, []byte, error) {
	var first bytes.Buffer
	d, err := open(r)
	if err != nil {
		return nil, nil, err
	}
	// The digest is over the bytes as they stand; a header is written by
	// json.Marshal, so that it is written the same again.
	text, err := json.Marshal(d.head)
	if err != nil {
		return nil, nil, err
	}
	first.Write(append(text, '\n'))
	return d, first.Bytes(), nil
}

// Load reads a backup that Verify found sound into an empty database that has
// its schema, in one transaction. raise is added to the epoch; files go to
// file, before anything is committed.
func Load(ctx context.Context, r io.Reader, into tables.Raw, raise uint64, file func(File) error) (Summary, error) {
	var out Summary
	d, head, err := start(r)
	if err != nil {
		return out, err
	}
	err = into.Write(ctx, func(t tables.DBTX) error {
		names, err := list(ctx, t, into)
		if err != nil {
			return err
		}
		for _, n := range names {
			var there int
			err := t.QueryRowContext(ctx, "SELECT 1 FROM "+n+" LIMIT 1").Scan(&there)
			if err == nil {
				return fmt.Errorf("%w: there are rows in table %s", ErrNotEmpty, n)
			}
			if !errors.Is(err, sql.ErrNoRows) {
				return fmt.Errorf("backup: look into table %s: %w", n, err)
			}
		}
		var insert, name string
		return d.each(head, func(l tableLine) error {
			if !slices.Contains(names, l.Table) {
				return fmt.Errorf("backup: load: this muster has no table %s", l.Table)
			}
			out.Tables++
			marks := make([]string, len(l.Columns))
			for i := range marks {
				marks[i] = "?" + strconv.Itoa(i+1)
			}
			name = l.Table
			insert = "INSERT INTO " + l.Table + " (" + strings.Join(l.Columns, ", ") + ") VALUES (" + strings.Join(marks, ", ") + ")"
			return nil
		}, func(values []any) error {
			if name == "settings" && len(values) == 2 && values[0] == "epoch" {
				n, err := strconv.ParseUint(fmt.Sprint(values[1]), 10, 64)
				if err != nil {
					return damaged("the epoch is no number")
				}
				values[1] = strconv.FormatUint(n+raise, 10)
			}
			if _, err := t.ExecContext(ctx, insert, values...); err != nil {
				return fmt.Errorf("backup: load a row of %s: %w", name, err)
			}
			return nil
		}, func(f File) error {
			out.Files++
			return file(f)
		})
	})
	out.Header, out.Rows = d.head, d.rows
	return out, err
}

// Schema returns the numbers of the migrations that a database has.
func Schema(ctx context.Context, raw tables.Raw) (out []int64, err error) {
	err = raw.Read(ctx, func(t tables.DBTX) error {
		out, err = schema(ctx, t)
		return err
	})
	return out, err
}
