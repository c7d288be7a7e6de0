package declare

import (
	"encoding"
	"encoding/base64"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/muster-edge/muster/fleet"
)

// reading collects what is wrong.
type reading struct{ problems []Problem }

func (r *reading) say(path, format string, args ...any) {
	if len(r.problems) < maxProblems {
		r.problems = append(r.problems, Problem{path, fmt.Sprintf(format, args...)})
	}
}

// member is a field of a struct by its name in JSON.
type member struct {
	name  string
	index []int
}

// members are the fields of a struct, with those of embedded ones.
func members(t reflect.Type) []member {
	var out []member
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			for _, m := range members(f.Type) {
				out = append(out, member{m.name, append([]int{i}, m.index...)})
			}
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name != "" && name != "-" {
			out = append(out, member{name, []int{i}})
		}
	}
	return out
}

// starts are what an object that was not there begins with.
var starts = map[reflect.Type]func() reflect.Value{
	reflect.TypeFor[fleet.UpdatePolicy](): func() reflect.Value { return reflect.ValueOf(fleet.DefaultUpdate()) },
}

var unmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()

// into brings to, what is there, to what the document says. def is what null
// stands for; not valid: the zero value.
func (r *reading) into(path string, v *value, to, def reflect.Value) {
	if v.kind == null {
		if !def.IsValid() {
			def = reflect.Zero(to.Type())
		}
		to.Set(def)
		return
	}
	if to.CanAddr() && to.Addr().Type().Implements(unmarshaler) {
		r.textInto(path, v, to)
		return
	}
	switch to.Kind() {
	case reflect.Pointer:
		elem := reflect.New(to.Type().Elem())
		switch start, known := starts[to.Type().Elem()]; {
		case !to.IsNil():
			elem.Elem().Set(to.Elem())
		case known:
			elem.Elem().Set(start())
		}
		to.Set(elem)
		var start reflect.Value
		if f, known := starts[to.Type().Elem()]; known {
			start = f()
		}
		r.into(path, v, elem.Elem(), start)
	case reflect.Struct:
		r.structInto(path, v, to, def)
	case reflect.Map:
		r.mapInto(path, v, to)
	case reflect.Slice:
		r.listInto(path, v, to)
	case reflect.String:
		if v.kind != text {
			r.wrong(path, v, text)
			return
		}
		to.SetString(v.s)
	case reflect.Bool:
		if v.kind != boolean {
			r.wrong(path, v, boolean)
			return
		}
		to.SetBool(v.b)
	case reflect.Int, reflect.Int64:
		if v.kind != number {
			r.wrong(path, v, number)
			return
		}
		n, err := strconv.ParseInt(v.s, 10, to.Type().Bits())
		if err != nil {
			r.say(path, "%s is no whole number of a size that fits", v.show())
			return
		}
		to.SetInt(n)
	default:
		r.say(path, "cannot be given here")
	}
}

func (r *reading) wrong(path string, v *value, want shape) {
	hint := ""
	if want == text && (v.kind == number || v.kind == boolean) {
		hint = ": put it in quotes"
	}
	r.say(path, "want %s, not %s%s", want, v.show(), hint)
}

func (r *reading) textInto(path string, v *value, to reflect.Value) {
	if v.kind != text {
		r.wrong(path, v, text)
		return
	}
	fresh := reflect.New(to.Type())
	if err := fresh.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(v.s)); err != nil { //nolint:forcetypeassert // the caller has looked
		r.say(path, "%s", plain(err))
		return
	}
	to.Set(fresh.Elem())
}

func (r *reading) structInto(path string, v *value, to, def reflect.Value) {
	if v.kind != object {
		r.wrong(path, v, object)
		return
	}
	known := members(to.Type())
	for _, f := range v.fields {
		i := slices.IndexFunc(known, func(m member) bool { return m.name == f.name })
		if i < 0 {
			var names []string
			for _, m := range known {
				names = append(names, m.name)
			}
			hint := near(f.name, names)
			if hint == "" {
				hint = "; there are " + strings.Join(names[:min(len(names), maxKnown)], ", ")
			}
			r.say(Field(path, f.name), "unknown field%s", hint)
			continue
		}
		var d reflect.Value
		if def.IsValid() {
			d = def.FieldByIndex(known[i].index)
		}
		r.into(Field(path, f.name), f.value, to.FieldByIndex(known[i].index), d)
	}
}

func (r *reading) mapInto(path string, v *value, to reflect.Value) {
	if v.kind != object {
		r.wrong(path, v, object)
		return
	}
	out := reflect.MakeMap(to.Type())
	for _, f := range v.fields {
		x := reflect.New(to.Type().Elem()).Elem()
		r.into(Field(path, f.name), f.value, x, reflect.Value{})
		out.SetMapIndex(reflect.ValueOf(f.name), x)
	}
	if out.Len() == 0 {
		out = reflect.Zero(to.Type())
	}
	to.Set(out)
}

func (r *reading) listInto(path string, v *value, to reflect.Value) {
	if to.Type().Elem().Kind() == reflect.Uint8 {
		b, err := base64.StdEncoding.DecodeString(v.s)
		if v.kind != text || err != nil {
			r.say(path, "want bytes in base64")
			return
		}
		to.SetBytes(b)
		return
	}
	if v.kind != list {
		r.wrong(path, v, list)
		return
	}
	out := reflect.MakeSlice(to.Type(), len(v.items), len(v.items))
	for i, x := range v.items {
		r.into(Index(path, i), x, out.Index(i), reflect.Value{})
	}
	if out.Len() == 0 {
		out = reflect.Zero(to.Type())
	}
	to.Set(out)
}

// near is a hint at the name that was perhaps meant, "" if there is none.
func near(name string, known []string) string {
	flat := func(s string) string { return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s)) }
	best, distance := "", hintDistance+1
	for _, k := range known {
		d := edits(flat(clip(name, 80)), flat(k))
		if d < distance && d < len(k) {
			best, distance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %s?", best)
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j]+1, row[j+1]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
