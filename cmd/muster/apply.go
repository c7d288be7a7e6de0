package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	musterv1 "github.com/muster-edge/muster/api/muster/v1"
	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/fleet/declare"
	"github.com/muster-edge/muster/fleet/declare/yamldoc"
)

const (
	// maxApplyFiles and maxApplyBytes bound what one call reads.
	maxApplyFiles = 1000
	maxApplyBytes = 16 << 20
	// applyTogether is how many documents one call of the API is asked to try,
	// and how many bytes.
	applyTogether      = 1000
	applyTogetherBytes = 8 << 20
)

// declared is a document with its place.
type declared struct {
	*yamldoc.Document
	parsed *declare.Document
	json   []byte
}

// applyProblem is a problem as -o json shows it.
type applyProblem struct {
	File     string `json:"file"`
	Line     int    `json:"line"`
	Problem  string `json:"problem"`
	Conflict bool   `json:"conflict,omitempty"`
}

func (p applyProblem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Problem) }

// appliedObject is what became of a document as -o json shows it.
type appliedObject struct {
	File       string          `json:"file"`
	Line       int             `json:"line"`
	Kind       string          `json:"kind"`
	Name       string          `json:"name"`
	Outcome    string          `json:"outcome"`
	Generation int64           `json:"generation,omitempty"`
	Before     json.RawMessage `json:"before,omitempty"`
	After      json.RawMessage `json:"after,omitempty"`
	Notes      []string        `json:"notes,omitempty"`
}

// applyResult is what muster apply -o json prints.
type applyResult struct {
	DryRun   bool            `json:"dry_run"`
	Objects  []appliedObject `json:"objects"`
	Problems []applyProblem  `json:"problems"`
	// NotTried counts the documents behind the one that failed.
	NotTried int `json:"not_tried,omitempty"`
}

// applyCommand is `muster apply -f FILE|-|DIR`.
func applyCommand() *cobra.Command {
	var (
		files    []string
		reason   string
		dry, yes bool
		f        format
	)
	cmd := &cobra.Command{
		Use:   "apply -f FILE|-|DIR [--dry-run]",
		Short: "Bring sites, stacks, assignments and rules to what YAML documents say",
		Long: `Reads YAML (or JSON) documents and brings the objects to what they say. Kinds are
Stack, StackVersion, Site, PreApprovalRule and Assignment; muster schema prints
their JSON Schemas, muster export writes what is there.

What a document does not name stays as it is, or is the default of a new object;
null is the default. Lists and labels are replaced as a whole. Unknown fields are
errors. Nothing is deleted: muster delete does that.

All documents are read and tried first. If anything is wrong with any of them,
all problems are listed with file and line, and nothing is changed. Then each
document is applied as a whole or not at all, in the order of their kinds. What
was applied already is left alone the next time.

A document with metadata.generation changes its object only if nobody else has
changed it since. --dry-run prints what would change and changes nothing.`,
		Example: `  muster apply -f examples/apply/fleet.yaml --dry-run
  muster apply -f sites/ --reason "spring opening"
  muster export site shop-7 | sed 's/servers: 1/servers: 3/' | muster apply -f -`,
		Args: noArgs,
	}
	a := accessFlags(cmd)
	formatFlag(cmd, &f)
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder (its .yaml, .yml and .json files) or - for standard input; may be repeated")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "say what would change, and change nothing")
	cmd.Flags().StringVar(&reason, "reason", "", "for the audit log")
	cmd.Flags().BoolVar(&yes, "accept-no-return", false, "also where a site's step raises etcd's minor version, which cannot be undone")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(files) == 0 {
			return exitError{2, errors.New("apply what? Give -f FILE, -f DIR or -f -")}
		}
		docs, problems, err := readDeclared(cmd.InOrStdin(), files)
		if err != nil {
			return err
		}
		if len(docs) == 0 && len(problems) == 0 {
			return exitError{2, errors.New("there is no document in it")}
		}
		r := applyRun{cmd: cmd, f: f, docs: docs, result: applyResult{DryRun: dry, Objects: []appliedObject{}, Problems: problems}, reason: reason, noReturn: yes}
		r.usage = len(problems) > 0
		if r.c, err = a.connect(); err != nil {
			if r.usage {
				return errors.Join(r.end(), err)
			}
			return err
		}
		return r.run()
	}
	return cmd
}

// readDeclared reads all files and finds what is wrong with the documents by
// themselves.
func readDeclared(stdin io.Reader, files []string) (docs []*declared, problems []applyProblem, err error) {
	names, err := declaredFiles(files)
	if err != nil {
		return nil, nil, err
	}
	total := 0
	where := make(map[string]string)
	say := func(p yamldoc.Problem) {
		problems = append(problems, applyProblem{File: p.File, Line: p.Line, Problem: p.Text})
	}
	for _, name := range names {
		b, err := readDeclaredFile(stdin, name)
		if err != nil {
			return nil, nil, err
		}
		if total += len(b); total > maxApplyBytes {
			return nil, nil, exitError{2, fmt.Errorf("the files have more than %d bytes together: apply them in parts", maxApplyBytes)}
		}
		read, err := yamldoc.Read(name, b)
		var bad *yamldoc.Error
		if errors.As(err, &bad) {
			say(bad.Problem)
			continue
		}
		for _, d := range read {
			for _, p := range d.Problems {
				say(p)
			}
			if d.JSON == nil {
				continue
			}
			parsed, wrong := declare.Parse(d.JSON)
			for _, p := range wrong {
				say(d.At(p))
			}
			if parsed == nil || len(wrong) > 0 {
				continue
			}
			if first, there := where[parsed.ID()]; there {
				say(d.At(declare.Problem{Path: "metadata.name", Text: parsed.ID() + " is in " + first + " already"}))
				continue
			}
			where[parsed.ID()] = fmt.Sprintf("%s:%d", d.File, d.Line)
			x := &declared{d, parsed, d.JSON}
			if err := x.fill(); err != nil {
				say(d.At(declare.Problem{Path: "spec.file", Text: err.Error()}))
				continue
			}
			docs = append(docs, x)
		}
	}
	order := declare.Kinds()
	slices.SortStableFunc(docs, func(x, y *declared) int {
		return slices.Index(order, x.parsed.Kind) - slices.Index(order, y.parsed.Kind)
	})
	return docs, problems, nil
}

func declaredFiles(files []string) (out []string, err error) {
	for _, name := range files {
		info, err := os.Stat(name)
		switch {
		case name == "-":
			out = append(out, name)
			continue
		case err != nil:
			return nil, exitError{2, err}
		case !info.IsDir():
			out = append(out, name)
			continue
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return nil, exitError{2, err}
		}
		found := 0
		for _, e := range entries {
			switch filepath.Ext(e.Name()) {
			case ".yaml", ".yml", ".json":
				if !e.IsDir() {
					out = append(out, filepath.Join(name, e.Name()))
					found++
				}
			}
		}
		if found == 0 {
			return nil, exitError{2, fmt.Errorf("there is no .yaml, .yml or .json file in %s (folders in it are not read)", name)}
		}
	}
	if len(out) > maxApplyFiles {
		return nil, exitError{2, fmt.Errorf("%d files, at most %d are read in one call", len(out), maxApplyFiles)}
	}
	return out, nil
}

func readDeclaredFile(stdin io.Reader, name string) ([]byte, error) {
	if name != "-" {
		return readLimited(name, yamldoc.MaxFile)
	}
	b, err := io.ReadAll(io.LimitReader(stdin, yamldoc.MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(b) > yamldoc.MaxFile {
		return nil, exitError{2, fmt.Errorf("standard input is larger than %d bytes", yamldoc.MaxFile)}
	}
	return b, nil
}

// fill puts the signed version in place of the name of its file.
func (d *declared) fill() error {
	if d.parsed.Kind != declare.StackVersion {
		return nil
	}
	var spec declare.StackVersionSpec
	if p := d.parsed.Over(&spec, &declare.StackVersionSpec{}); len(p) > 0 || spec.File == "" {
		return nil
	}
	name := spec.File
	if !filepath.IsAbs(name) && d.File != "-" {
		name = filepath.Join(filepath.Dir(d.File), name)
	}
	b, err := readLimited(name, fleet.MaxEnvelope)
	if err != nil {
		return err
	}
	spec.File, spec.Envelope = "", b
	d.json, err = declare.Write(declare.StackVersion, d.parsed.Metadata, spec)
	return err
}

// applyRun is one call of muster apply.
type applyRun struct {
	cmd      *cobra.Command
	c        *centre
	f        format
	docs     []*declared
	result   applyResult
	reason   string
	noReturn bool
	// usage: something is wrong with the documents by themselves.
	usage bool
}

func (r *applyRun) table() bool { return r.f == "table" || r.f == "wide" }

func (r *applyRun) run() error {
	tried, err := r.try()
	if err != nil {
		return err
	}
	if r.result.DryRun {
		r.result.Objects = tried
		for _, o := range tried {
			if err := r.show(o); err != nil {
				return err
			}
		}
		return r.end()
	}
	if len(r.result.Problems) > 0 {
		return r.end()
	}
	for i, d := range r.docs {
		out, err := r.c.Apply(r.cmd.Context(), &musterv1.ApplyRequest{Documents: [][]byte{d.json}, Reason: r.reason, AcceptNoReturn: r.noReturn})
		if err != nil {
			r.result.NotTried = len(r.docs) - i
			return errors.Join(r.c.explain(err), r.end())
		}
		for _, o := range out.Objects {
			x := r.object(o, d)
			r.result.Objects = append(r.result.Objects, x)
			if err := r.show(x); err != nil {
				return err
			}
		}
		if len(out.Problems) > 0 {
			r.problems(out.Problems, []*declared{d})
			r.result.NotTried = len(r.docs) - i - 1
			return r.end()
		}
	}
	return r.end()
}

// try asks the centre what would become of all documents.
func (r *applyRun) try() (tried []appliedObject, err error) {
	for from := 0; from < len(r.docs); {
		to, size := from, 0
		var all [][]byte
		for to < len(r.docs) && len(all) < applyTogether && size+len(r.docs[to].json) < applyTogetherBytes {
			size += len(r.docs[to].json)
			all = append(all, r.docs[to].json)
			to++
		}
		part := r.docs[from:to]
		out, err := r.c.Apply(r.cmd.Context(), &musterv1.ApplyRequest{Documents: all, DryRun: true, Reason: r.reason, AcceptNoReturn: r.noReturn})
		if err != nil {
			return nil, r.c.explain(err)
		}
		for _, o := range out.Objects {
			if int(o.Document) < len(part) {
				tried = append(tried, r.object(o, part[o.Document]))
			}
		}
		r.problems(out.Problems, part)
		if out.MoreProblems {
			fmt.Fprintln(r.cmd.ErrOrStderr(), "there may be more problems: these are looked for when those are mended")
		}
		from = to
	}
	return tried, nil
}

func (r *applyRun) problems(list []*musterv1.ApplyProblem, part []*declared) {
	for _, p := range list {
		if int(p.Document) >= len(part) {
			continue
		}
		at := part[p.Document].At(declare.Problem{Path: p.Path, Text: p.Problem})
		r.result.Problems = append(r.result.Problems, applyProblem{File: at.File, Line: at.Line, Problem: at.Text, Conflict: p.Conflict})
	}
}

func (r *applyRun) object(o *musterv1.AppliedObject, d *declared) appliedObject {
	return appliedObject{
		File: d.File, Line: d.Line, Kind: o.Kind, Name: o.Name, Outcome: o.Outcome, Generation: o.Generation, Before: o.Before, After: o.After, Notes: o.Notes,
	}
}

// show tells of one document.
func (r *applyRun) show(o appliedObject) error {
	w := r.cmd.OutOrStdout()
	switch {
	case r.f == "name":
		fmt.Fprintf(w, "%s/%s\n", strings.ToLower(o.Kind), cell(o.Name))
		return nil
	case !r.table():
		return nil
	}
	verb := o.Outcome
	if r.result.DryRun && o.Outcome != "unchanged" {
		verb = "would be " + o.Outcome
	}
	fmt.Fprintf(w, "%s %s %s\n", o.Kind, cell(o.Name), verb)
	for _, n := range o.Notes {
		fmt.Fprintf(r.cmd.ErrOrStderr(), "  note: %s\n", cell(n))
	}
	if !r.result.DryRun || o.Outcome == "unchanged" {
		return nil
	}
	text, err := difference(o)
	if err == nil {
		_, err = io.WriteString(w, text)
	}
	return err
}

// difference shows what would change as people compare files.
func difference(o appliedObject) (string, error) {
	before, err := forDiff(o.Before)
	if err != nil {
		return "", err
	}
	after, err := forDiff(o.After)
	if err != nil {
		return "", err
	}
	lines := strings.Split(string(diff.Diff("is", before, "would be", after)), "\n")
	// The first line names a command that nobody ran.
	if len(lines) > 0 && strings.HasPrefix(lines[0], "diff ") {
		lines = lines[1:]
	}
	return strings.Join(lines, "\n"), nil
}

func forDiff(doc []byte) ([]byte, error) {
	if len(doc) == 0 {
		return nil, nil
	}
	var tree map[string]any
	if err := json.Unmarshal(doc, &tree); err != nil {
		return nil, fmt.Errorf("read what the centre sent: %w", err)
	}
	if m, is := tree["metadata"].(map[string]any); is {
		delete(m, "generation")
	}
	var b bytes.Buffer
	err := writeYAML(&b, tree)
	return b.Bytes(), err
}

// end says how it went as a whole.
func (r *applyRun) end() error {
	slices.SortStableFunc(r.result.Problems, func(a, b applyProblem) int {
		if a.File != b.File {
			return strings.Compare(a.File, b.File)
		}
		return a.Line - b.Line
	})
	if r.f == "json" || r.f == "yaml" {
		if err := r.f.write(r.cmd.OutOrStdout(), r.result, table{}); err != nil {
			return err
		}
	}
	for _, p := range r.result.Problems {
		fmt.Fprintln(r.cmd.ErrOrStderr(), cell(p.String()))
	}
	done := 0
	for _, o := range r.result.Objects {
		if o.Outcome != "unchanged" {
			done++
		}
	}
	code := 1
	if r.usage {
		code = 2
	}
	switch n := len(r.result.Problems); {
	case n == 0 && r.result.NotTried == 0:
		if r.table() && r.result.DryRun {
			fmt.Fprintln(r.cmd.ErrOrStderr(), "nothing was changed: this was a dry run")
		}
		return nil
	case r.result.DryRun || len(r.result.Objects) == 0:
		return exitError{code, fmt.Errorf("%s; nothing was changed", count(n, "problem", "problems"))}
	default:
		return exitError{code, fmt.Errorf("%s changed, and %s not tried; apply it again when this is mended: what is done stays done",
			count(done, "object was", "objects were"), count(r.result.NotTried, "document was", "documents were"))}
	}
}
