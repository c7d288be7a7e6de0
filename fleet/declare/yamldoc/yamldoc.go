// Package yamldoc reads files of YAML (or JSON) documents as package declare
// wants them: the JSON of each, and the line of each of its fields, so that
// every problem has a place. It takes the part of YAML that people write by
// hand: anchors, aliases, merge keys and tags are refused, and what a file can
// make it hold is bounded by a scan before anything is parsed.
package yamldoc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"

	yaml "go.yaml.in/yaml/v3"

	"github.com/muster-edge/muster/fleet/declare"
)

// Bounds of one file.
const (
	// MaxFile is its size.
	MaxFile = 4 << 20
	// MaxDocuments is how many documents it holds.
	MaxDocuments = 5000
	// maxMarks bounds the characters that can begin a node: the parser makes
	// at most as many nodes, of about 250 bytes each.
	maxMarks = 400_000
	maxDepth = 32
)

// Document is one document of a file.
type Document struct {
	// File and Line are where it begins.
	File string
	Line int
	// JSON is the document; nil if Problems say that it has none.
	JSON []byte
	// Problems are those of its YAML.
	Problems []Problem
	lines    map[string]int
}

// Problem is something wrong at a line.
type Problem struct {
	File string
	Line int
	Text string
}

// String is the problem as compilers write it.
func (p Problem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text) }

// At gives a problem of the document its line: that of the field, or of the
// closest field around it.
func (d *Document) At(p declare.Problem) Problem {
	path := p.Path
	for {
		if line, known := d.lines[path]; known {
			words := p.Text
			if p.Path != "" {
				words = p.Path + ": " + p.Text
			}
			return Problem{d.File, line, words}
		}
		if path == "" {
			return Problem{d.File, d.Line, p.String()}
		}
		path = declare.Parent(path)
	}
}

// Read reads all documents of a file. The error is for a file that cannot be
// read as YAML at all; it is a Problem with its line.
func Read(file string, b []byte) ([]*Document, error) {
	fail := func(line int, format string, args ...any) ([]*Document, error) {
		return nil, &Error{Problem{file, line, fmt.Sprintf(format, args...)}}
	}
	if len(b) > MaxFile {
		return fail(1, "the file has %d bytes, at most %d are allowed: spread its documents over several files", len(b), MaxFile)
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return fail(1+bytes.Count(b[:i], []byte("\n")), "this is no text: there is a zero byte")
	}
	marks := 0
	for _, c := range b {
		switch c {
		case '\n', '\r', ',', ':', '-', '[', '{', '?':
			marks++
		}
	}
	if marks > maxMarks {
		return fail(1, "the file has too many lines and values: spread its documents over several files")
	}
	var out []*Document
	d := yaml.NewDecoder(bytes.NewReader(b))
	for {
		var root yaml.Node
		err := d.Decode(&root)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			line, words := place(err)
			out, _ := fail(line, "%s", words)
			return out, &Error{Problem{file, line, words}}
		}
		if len(out) == MaxDocuments {
			return fail(root.Line, "the file has more than %d documents: spread them over several files", MaxDocuments)
		}
		if doc := document(file, &root); doc != nil {
			out = append(out, doc)
		}
	}
}

// Error is why a file could not be read.
type Error struct{ Problem }

// Error implements error.
func (e *Error) Error() string { return e.String() }

var linePrefix = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// place takes the line out of an error of the parser.
func place(err error) (int, string) {
	s := err.Error()
	m := linePrefix.FindStringSubmatch(s)
	if m == nil {
		return 1, s
	}
	n, convErr := strconv.Atoi(m[1])
	if convErr != nil {
		n = 1
	}
	return max(n, 1), "this is no YAML: " + strings.TrimPrefix(s, m[0])
}

// document converts one document, nil for an empty one.
func document(file string, root *yaml.Node) *Document {
	if root.Kind != yaml.DocumentNode || len(root.Content) != 1 {
		return nil
	}
	top := root.Content[0]
	if top.Kind == yaml.ScalarNode && top.Tag == "!!null" && top.Anchor == "" {
		return nil
	}
	doc := &Document{File: file, Line: top.Line, lines: map[string]int{"": top.Line}}
	c := &converter{doc: doc}
	var b bytes.Buffer
	c.write(&b, "", top, 0)
	if len(doc.Problems) == 0 {
		doc.JSON = b.Bytes()
	}
	return doc
}

const maxProblems = 32

type converter struct{ doc *Document }

func (c *converter) say(n *yaml.Node, format string, args ...any) {
	if len(c.doc.Problems) < maxProblems {
		c.doc.Problems = append(c.doc.Problems, Problem{c.doc.File, n.Line, fmt.Sprintf(format, args...)})
	}
}

func (c *converter) write(b *bytes.Buffer, path string, n *yaml.Node, depth int) {
	switch {
	case depth > maxDepth:
		c.say(n, "nested deeper than %d levels", maxDepth)
		return
	case n.Kind == yaml.AliasNode:
		c.say(n, "aliases (*%.40s) are not taken: write the value out", n.Value)
		return
	case n.Anchor != "":
		c.say(n, "anchors (&%.40s) are not taken: write the values out", n.Anchor)
		return
	}
	switch n.Kind {
	case yaml.MappingNode:
		c.mapping(b, path, n, depth)
	case yaml.SequenceNode:
		if n.Tag != "!!seq" {
			c.say(n, "the tag %.40s is not taken", n.Tag)
		}
		b.WriteByte('[')
		for i, x := range n.Content {
			if i > 0 {
				b.WriteByte(',')
			}
			p := declare.Index(path, i)
			c.doc.lines[p] = x.Line
			c.write(b, p, x, depth+1)
		}
		b.WriteByte(']')
	case yaml.ScalarNode:
		c.scalar(b, n)
	default:
		c.say(n, "this is not understood")
	}
}

func (c *converter) mapping(b *bytes.Buffer, path string, n *yaml.Node, depth int) {
	if n.Tag != "!!map" {
		c.say(n, "the tag %.40s is not taken", n.Tag)
	}
	first := make(map[string]int)
	b.WriteByte('{')
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, x := n.Content[i], n.Content[i+1]
		switch {
		case k.Kind == yaml.AliasNode || k.Anchor != "":
			c.say(k, "anchors and aliases are not taken")
			continue
		case k.Tag == "!!merge":
			c.say(k, "merge keys (<<) are not taken: write the values out")
			continue
		case k.Kind != yaml.ScalarNode:
			c.say(k, "the name of a field is text")
			continue
		}
		if at, there := first[k.Value]; there {
			c.say(k, "field %.80q is there twice, first in line %d", k.Value, at)
			continue
		}
		first[k.Value] = k.Line
		if len(first) > 1 {
			b.WriteByte(',')
		}
		quote(b, k.Value)
		b.WriteByte(':')
		p := declare.Field(path, k.Value)
		c.doc.lines[p] = k.Line
		c.write(b, p, x, depth+1)
	}
	b.WriteByte('}')
}

func (c *converter) scalar(b *bytes.Buffer, n *yaml.Node) {
	switch n.Tag {
	case "!!str", "!!timestamp":
		quote(b, n.Value)
	case "!!null":
		b.WriteString("null")
	case "!!bool":
		var v bool
		if err := n.Decode(&v); err != nil {
			c.say(n, "%.60q is neither true nor false", n.Value)
		}
		b.WriteString(strconv.FormatBool(v))
	case "!!int":
		var v int64
		if err := n.Decode(&v); err != nil {
			c.say(n, "the number %.60s is too large", n.Value)
		}
		b.WriteString(strconv.FormatInt(v, 10))
	case "!!float":
		v, err := strconv.ParseFloat(n.Value, 64)
		if err != nil || math.IsInf(v, 0) || math.IsNaN(v) {
			c.say(n, "%.60s is no number", n.Value)
			v = 0
		}
		// As it was written: "want text, not 2027.10" then says what to quote.
		if err == nil && json.Valid([]byte(n.Value)) {
			b.WriteString(n.Value)
			return
		}
		b.WriteString(strconv.FormatFloat(v, 'g', -1, 64))
	default:
		c.say(n, "the tag %.40s is not taken", n.Tag)
		b.WriteString("null")
	}
}

func quote(b *bytes.Buffer, s string) {
	q, err := json.Marshal(s)
	if err != nil {
		q = []byte(`""`) // strings cannot fail
	}
	b.Write(q)
}
