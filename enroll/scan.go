package enroll

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// ErrListed says that a scan has the machine already.
var ErrListed = errors.New("enroll: the machine is on the list already")

// AppendScan adds a machine to the CSV of a warehouse scan (ParseList reads
// it), with the header if the file is empty. A serial number that a list may
// not hold is left out, since a machine's firmware says what it likes; dropped
// tells why, "" if it was not. model, of which the same is true, and the words
// that name the machine are for people. A file that would not be read is not
// added to.
func AppendScan(list []byte, e fleet.ListedEK, model string) (out []byte, dropped string, err error) {
	columns := []string{"ek_sha256", "serial", "site", "model", "words"}
	if len(bytes.TrimSpace(list)) > 0 {
		r := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(list, []byte("\xef\xbb\xbf"))))
		header, err := r.Read()
		if err != nil {
			return nil, "", fmt.Errorf("enroll: add to list: %w", err)
		}
		for i := range header {
			header[i] = strings.TrimSpace(header[i])
		}
		columns = header
		// A header alone is a list to which nothing was added yet.
		l := ParseList(list)
		if empty := len(l.EKs) == 0 && len(l.Problems) == 1 && l.Problems[0].Line == 0; len(l.Problems) > 0 && !empty {
			return nil, "", fmt.Errorf("enroll: add to list: line %d: %s", l.Problems[0].Line, l.Problems[0].Why)
		}
		if slices.ContainsFunc(l.EKs, func(o fleet.ListedEK) bool { return o.EK == e.EK }) {
			return nil, "", ErrListed
		}
	}
	e.Serial = strings.TrimSpace(e.Serial)
	if why := unfit(e.Serial); why != "" || len(e.Serial) > maxListCell {
		if dropped = why; dropped == "" {
			dropped = "it is too long"
		}
		e.Serial = ""
	}
	if model = strings.TrimSpace(model); unfit(model) != "" || len(model) > maxListCell {
		model = ""
	}
	var row []string
	for _, c := range columns {
		key, isLabel := strings.CutPrefix(c, "label:")
		switch {
		case isLabel:
			row = append(row, e.Labels[key])
		case c == "ek_sha256":
			row = append(row, e.EK.String())
		case c == "serial":
			row = append(row, e.Serial)
		case c == "site":
			row = append(row, e.Site)
		case c == "model":
			row = append(row, model)
		case c == "words":
			row = append(row, fleet.Words(e.EK.NodeID()))
		}
	}
	var b bytes.Buffer
	b.Write(list)
	if len(list) > 0 && list[len(list)-1] != '\n' {
		b.WriteByte('\n')
	}
	w := csv.NewWriter(&b)
	if len(bytes.TrimSpace(list)) == 0 {
		_ = w.Write(columns)
	}
	_ = w.Write(row)
	w.Flush()
	if l := ParseList(b.Bytes()); len(l.Problems) > 0 {
		return nil, "", fmt.Errorf("enroll: add to list: %s", l.Problems[len(l.Problems)-1].Why)
	}
	return b.Bytes(), dropped, nil
}
