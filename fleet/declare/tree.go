package declare

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// shape is the sort of a value.
type shape uint8

const (
	null shape = iota
	boolean
	number
	text
	list
	object
)

var shapeNames = [...]string{"null", "true or false", "a number", "text", "a list", "an object"}

// String is the sort in words.
func (s shape) String() string { return shapeNames[s] }

// value is a JSON value that keeps the order of fields.
type value struct {
	kind   shape
	b      bool
	s      string // of text and numbers
	items  []*value
	fields []field
}

type field struct {
	name  string
	value *value
}

func (v *value) field(name string) *value {
	for _, f := range v.fields {
		if f.name == name {
			return f.value
		}
	}
	return nil
}

// show is a short form for messages.
func (v *value) show() string {
	switch v.kind {
	case text:
		return strconv.Quote(clip(v.s, 60))
	case number:
		return clip(v.s, 60)
	case boolean:
		return strconv.FormatBool(v.b)
	}
	return v.kind.String()
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}

// walk calls f with the path and the name of every field.
func (v *value) walk(path string, f func(path, name string)) {
	for _, x := range v.fields {
		p := Field(path, x.name)
		f(p, x.name)
		x.value.walk(p, f)
	}
	for i, x := range v.items {
		x.walk(Index(path, i), f)
	}
}

var plainField = regexp.MustCompile(`^[A-Za-z0-9_-]{1,80}$`)

// Field is the path of a field of an object.
func Field(path, name string) string {
	switch {
	case !plainField.MatchString(name):
		return path + "[" + strconv.Quote(clip(name, 80)) + "]"
	case path == "":
		return name
	}
	return path + "." + name
}

// Index is the path of an item of a list.
func Index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// Parent is the path of what holds the field, "" for the document.
func Parent(path string) string {
	if strings.HasSuffix(path, `"]`) {
		if i := strings.LastIndex(path, `["`); i >= 0 {
			return path[:i]
		}
	}
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
}

// parseTree reads one JSON value of bounded depth and size.
func parseTree(b []byte) (*value, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	p := &treeParser{d: d}
	v, err := p.value(0)
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errors.New("the document ends too early")
		}
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is data after the end of the document")
	}
	return v, nil
}

type treeParser struct {
	d     *json.Decoder
	nodes int
}

func (p *treeParser) value(depth int) (*value, error) {
	if p.nodes++; p.nodes > maxNodes {
		return nil, fmt.Errorf("the document has more than %d values", maxNodes)
	}
	if depth > maxDepth {
		return nil, fmt.Errorf("the document is nested deeper than %d levels", maxDepth)
	}
	t, err := p.d.Token()
	if err != nil {
		return nil, err
	}
	switch t := t.(type) {
	case nil:
		return &value{}, nil
	case bool:
		return &value{kind: boolean, b: t}, nil
	case json.Number:
		return &value{kind: number, s: t.String()}, nil
	case string:
		return &value{kind: text, s: t}, nil
	case json.Delim:
		if t == '[' {
			return p.list(depth)
		}
		return p.object(depth)
	}
	return nil, fmt.Errorf("unexpected %v", t)
}

func (p *treeParser) list(depth int) (*value, error) {
	v := &value{kind: list}
	for p.d.More() {
		x, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		v.items = append(v.items, x)
	}
	_, err := p.d.Token()
	return v, err
}

func (p *treeParser) object(depth int) (*value, error) {
	v := &value{kind: object}
	seen := make(map[string]bool)
	for p.d.More() {
		t, err := p.d.Token()
		if err != nil {
			return nil, err
		}
		name, isText := t.(string)
		if !isText {
			return nil, fmt.Errorf("unexpected %v", t)
		}
		if seen[name] {
			return nil, fmt.Errorf("field %q is there twice", clip(name, 80))
		}
		seen[name] = true
		x, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		v.fields = append(v.fields, field{name, x})
	}
	_, err := p.d.Token()
	return v, err
}
