package enroll

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/muster-edge/muster/fleet"
)

// Caps of an EK list.
const (
	MaxListBytes = 10 << 20
	maxListCell  = 256
	// maxListProblems are kept; more are counted.
	maxListProblems = 1000
)

// LineProblem is something wrong with one line of a list; Line 0 is the whole
// file.
type LineProblem struct {
	Line int
	Why  string
}

// List is an EK list that was read.
type List struct {
	EKs []fleet.ListedEK
	// Lines are the line numbers of EKs.
	Lines []int
	// Problems are in the order of lines. With any, nothing may be imported.
	Problems []LineProblem
	// More counts the problems beyond those kept.
	More int
}

// Add notes a problem.
func (l *List) Add(line int, format string, args ...any) {
	if len(l.Problems) >= maxListProblems {
		l.More++
		return
	}
	l.Problems = append(l.Problems, LineProblem{line, fmt.Sprintf(format, args...)})
}

// Sort brings the problems into the order of lines.
func (l *List) Sort() {
	slices.SortStableFunc(l.Problems, func(a, b LineProblem) int { return a.Line - b.Line })
}

// ParseList reads the CSV (RFC 4180) of a warehouse scan: a header with
// ek_sha256 and any of serial, site, model, words, label:KEY, then one machine
// a line. words must be those of the EK; model is not kept. It reads to the end to name everything that is wrong at once. Cells that a
// spreadsheet could take for a formula are refused in serial, the only column
// of free text.
func ParseList(b []byte) List {
	var l List
	if len(b) > MaxListBytes {
		l.Add(0, "the file has %d bytes, at most %d are allowed", len(b), MaxListBytes)
		return l
	}
	b = bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")) // spreadsheets write a byte order mark
	if !utf8.Valid(b) {
		l.Add(0, "the file is not UTF-8: save it as CSV UTF-8")
		return l
	}
	r := csv.NewReader(bytes.NewReader(b))
	r.FieldsPerRecord, r.ReuseRecord = -1, true
	header, err := r.Read()
	if err != nil {
		l.Add(1, "there is no header: want ek_sha256[,serial][,site][,label:KEY]")
		return l
	}
	columns := slices.Clone(header)
	if !l.header(columns) {
		return l
	}
	seen := map[fleet.EKHash]int{}
	for {
		row, err := r.Read()
		var bad *csv.ParseError
		switch {
		case err == io.EOF:
			if len(l.EKs) == 0 && len(l.Problems) == 0 {
				l.Add(0, "the file lists no machine")
			}
			return l
		case errors.As(err, &bad):
			// A stray quote swallows lines; what follows would be nonsense.
			l.Add(bad.Line, "this is no CSV: %v; what follows it was not read", bad.Err)
			return l
		case err != nil:
			l.Add(0, "the file cannot be read: %v", err)
			return l
		}
		line, _ := r.FieldPos(0)
		if len(l.EKs) >= fleet.MaxListedEKs {
			l.Add(line, "more than %d machines; make several lists of it", fleet.MaxListedEKs)
			return l
		}
		if len(row) != len(columns) {
			l.Add(line, "%d columns, the header has %d", len(row), len(columns))
			continue
		}
		e, known := l.row(line, columns, row)
		if !known {
			continue
		}
		if first, twice := seen[e.EK]; twice {
			l.Add(line, "the EK %s is on line %d already", e.EK, first)
			continue
		}
		seen[e.EK] = line
		l.EKs, l.Lines = append(l.EKs, e), append(l.Lines, line)
	}
}

func (l *List) header(columns []string) bool {
	if len(columns) > 5+fleet.MaxLabels {
		l.Add(1, "%d columns, at most %d are allowed", len(columns), 5+fleet.MaxLabels)
		return false
	}
	before := len(l.Problems)
	seen := map[string]bool{}
	for i, c := range columns {
		c = strings.TrimSpace(c)
		columns[i] = c
		key, isLabel := strings.CutPrefix(c, "label:")
		switch {
		case seen[c]:
			l.Add(1, "the column %.80q is there twice", c)
		case isLabel:
			if err := fleet.ValidateLabels(map[string]string{key: ""}); err != nil {
				l.Add(1, "column %.80q: %s", c, plain(err))
			}
		case c != "ek_sha256" && c != "serial" && c != "site" && c != "model" && c != "words":
			l.Add(1, "the column %.80q is not known: want ek_sha256, serial, site, model, words, label:KEY", c)
		}
		seen[c] = true
	}
	if !seen["ek_sha256"] {
		l.Add(1, "the column ek_sha256 is missing")
	}
	return len(l.Problems) == before
}

// row reads one line; every cell that is wrong is a problem of its own, and
// left out. known: there is an EK, so that it can be compared with others.
func (l *List) row(line int, columns, row []string) (e fleet.ListedEK, known bool) {
	bad := func(format string, args ...any) { l.Add(line, format, args...) }
	words := ""
	for i, cell := range row {
		cell = strings.TrimSpace(cell)
		if len(cell) > maxListCell {
			bad("%s has %d bytes, at most %d are allowed", columns[i], len(cell), maxListCell)
			continue
		}
		switch columns[i] {
		case "ek_sha256":
			ek, err := fleet.ParseEKHash(cell)
			switch {
			case err != nil:
				bad("ek_sha256 %.80q: want 64 hex digits", cell)
			case ek == (fleet.EKHash{}):
				bad("ek_sha256 is all zeros")
			default:
				e.EK, known = ek, true
			}
		case "serial":
			if why := unfit(cell); why != "" {
				bad("serial %.80q: %s", cell, why)
				break
			}
			e.Serial = strings.Clone(cell)
		case "model":
			if why := unfit(cell); why != "" {
				bad("model %.80q: %s", cell, why)
			}
		case "words":
			words = strings.Join(strings.Fields(strings.ToLower(cell)), " ")
		case "site":
			if cell == "" {
				break
			}
			if err := fleet.ValidateName("site", cell); err != nil {
				bad("site %.80q: want a name of a-z, 0-9 and '-'", cell)
			} else if cell == fleet.PoolSite {
				bad("site %q: the name stands for nodes without a site; leave the cell empty", cell)
			} else {
				e.Site = strings.Clone(cell)
			}
		default:
			if cell == "" {
				break
			}
			labels := map[string]string{strings.TrimPrefix(columns[i], "label:"): strings.Clone(cell)}
			if err := fleet.ValidateLabels(labels); err != nil {
				bad("%s", plain(err))
				break
			}
			if e.Labels == nil {
				e.Labels = map[string]string{}
			}
			maps.Copy(e.Labels, labels)
		}
	}
	// Whoever types a list from cartons makes slips in 64 digits, and words
	// show them.
	if want := fleet.Words(e.EK.NodeID()); known && words != "" && words != want {
		bad("words %.80q: the EK's are %q", words, want)
	}
	return e, known
}

// unfit says what is wrong with free text that people will see again in
// terminals and spreadsheets.
func unfit(s string) string {
	if s == "" {
		return ""
	}
	if strings.ContainsRune("=+-@|%", rune(s[0])) {
		return "it begins like a formula of a spreadsheet"
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f || r > 0x7e {
			return fmt.Sprintf("it holds the character %U; want printable ASCII", r)
		}
	}
	return ""
}

// plain is an error of fleet without its package and over one line.
func plain(err error) string {
	return strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\n", "; "), "fleet: ")
}
