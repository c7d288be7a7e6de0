package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var start = time.Date(2027, 1, 2, 3, 4, 5, 678901234, time.FixedZone("CET", 3600))

// chain appends n records that differ.
func chain(t testing.TB, tenant string, n int) []Record {
	t.Helper()
	var head Head
	var list []Record
	for i := range n {
		r, err := Append(head, Record{
			Tenant: tenant, Time: start.Add(time.Duration(i) * time.Second), Actor: "user:ada", Source: "192.0.2.1",
			Kind: kinds[i%len(kinds)], Object: fmt.Sprintf("request/r-%d", i),
			Before: json.RawMessage(fmt.Sprintf(`{ "n": %d, "s": "<&>" }`, i)),
			After:  json.RawMessage(fmt.Sprintf(`{"n": %d}`, i+1)),
			Reason: "because",
		})
		if err != nil {
			t.Fatal(err)
		}
		list, head = append(list, r), HeadOf(r)
	}
	return list
}

func TestAppendMakesAChainThatHolds(t *testing.T) {
	list := chain(t, "default", 100)
	if err := Verify(list); err != nil {
		t.Fatal(err)
	}
	if err := Verify(nil); err != nil {
		t.Errorf("the empty chain: %v", err)
	}
	r := list[0]
	if r.Seq != 1 || !r.Prev.IsZero() || r.Time.Location() != time.UTC || r.Time.Nanosecond() != 678901000 {
		t.Errorf("first record is %+v", r)
	}
	if got, want := string(r.Before), "{\"n\":0,\"s\":\"\\u003c\\u0026\\u003e\"}"; got != want {
		t.Errorf("before is %s, want %s", got, want)
	}
}

// The hash is written down here: a change of the fields or of their order
// would break every chain in the field.
func TestHashIsFrozen(t *testing.T) {
	const want = "01fc4fdb07dd6e60442c9c76d39f459a5e6ac83db0c7bad8560f2c50841ccb22"
	if got := chain(t, "default", 3)[2].Hash.String(); got != want {
		t.Errorf("hash is %s, want %s", got, want)
	}
}

func TestAppendRefuses(t *testing.T) {
	good := Record{Tenant: "default", Time: start, Actor: "system", Kind: RequestFiled, Object: "request/x"}
	if _, err := Append(Head{}, good); err != nil {
		t.Fatalf("the unchanged record: %v", err)
	}
	for name, change := range map[string]func(*Record){
		"no tenant":             func(r *Record) { r.Tenant = "" },
		"no time":               func(r *Record) { r.Time = time.Time{} },
		"year 10000":            func(r *Record) { r.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"no actor":              func(r *Record) { r.Actor = "" },
		"no object":             func(r *Record) { r.Object = "" },
		"unknown kind":          func(r *Record) { r.Kind = "request.forgotten" },
		"no kind":               func(r *Record) { r.Kind = "" },
		"actor that is no UTF8": func(r *Record) { r.Actor = "user:\xff" },
		"reason with ESC":       func(r *Record) { r.Reason = "\x1b[2J" },
		"long reason":           func(r *Record) { r.Reason = strings.Repeat("x", 2000) },
		"before is no JSON":     func(r *Record) { r.Before = json.RawMessage("{") },
		"two JSON values":       func(r *Record) { r.After = json.RawMessage("{} {}") },
		"JSON null":             func(r *Record) { r.After = json.RawMessage("null") },
		"JSON that is no UTF8":  func(r *Record) { r.After = json.RawMessage("\"\xff\"") },
		"huge JSON":             func(r *Record) { r.After = json.RawMessage(`"` + strings.Repeat("x", 1<<20) + `"`) },
		"JSON huge when escaped": func(r *Record) {
			r.After = json.RawMessage(`"` + strings.Repeat("<", 100<<10) + `"`)
		},
	} {
		r := good
		change(&r)
		if _, err := Append(Head{}, r); err == nil {
			t.Errorf("%s: it was appended", name)
		}
	}
}

// wantBreak wants a BreakError at the place.
func wantBreak(t interface {
	Helper()
	Fatalf(string, ...any)
}, err error, seq uint64,
) {
	t.Helper()
	var b *BreakError
	if !errors.As(err, &b) {
		t.Fatalf("error is %v, want a break at record %d", err, seq)
	}
	if b.Seq != seq {
		t.Fatalf("error names record %d, want %d: %v", b.Seq, seq, err)
	}
}

func TestEveryChangeIsFound(t *testing.T) {
	changes := map[string]func(*Record){
		"seq":      func(r *Record) { r.Seq++ },
		"tenant":   func(r *Record) { r.Tenant += "x" },
		"time":     func(r *Record) { r.Time = r.Time.Add(time.Microsecond) },
		"nano":     func(r *Record) { r.Time = r.Time.Add(time.Nanosecond) },
		"zone":     func(r *Record) { r.Time = r.Time.In(time.FixedZone("x", 60)) },
		"actor":    func(r *Record) { r.Actor += "x" },
		"source":   func(r *Record) { r.Source = "" },
		"kind":     func(r *Record) { r.Kind = AuditExported },
		"object":   func(r *Record) { r.Object += "x" },
		"before":   func(r *Record) { r.Before = nil },
		"after":    func(r *Record) { r.After = json.RawMessage(`{"n":4711}`) },
		"spaces":   func(r *Record) { r.After = append(json.RawMessage(" "), r.After...) },
		"reason":   func(r *Record) { r.Reason += "x" },
		"prev":     func(r *Record) { r.Prev[31] ^= 1 },
		"hash":     func(r *Record) { r.Hash[0] ^= 1 },
		"swapped":  func(r *Record) { r.Before, r.After = r.After, r.Before },
		"shifted":  func(r *Record) { r.Actor, r.Source = r.Actor+r.Source, "" },
		"rehashed": func(r *Record) { r.Reason = "other"; r.Hash = hashOf(*r) },
	}
	fields := reflect.TypeFor[Record]().NumField()
	if fields != 12 {
		t.Fatalf("a record has %d fields; the list of changes covers 12", fields)
	}
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 12).Draw(t, "n")
		list := chain(&testing.T{}, "default", n)
		name := rapid.SampledFrom(slices.Sorted(keys(changes))).Draw(t, "change")
		i := rapid.IntRange(0, n-1).Draw(t, "record")
		head := HeadOf(list[n-1])
		changes[name](&list[i])
		// A change of the last record with a new hash, and a changed tenant
		// in the first of one, show against a pinned head only.
		err := Verify(list, head)
		where := uint64(i + 1)
		if name == "rehashed" && i < n-1 {
			where++
		}
		if name == "tenant" && i == 0 {
			where = 1
		}
		wantBreak(t, err, where)
	})
}

func keys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func TestDeletionSwapInsertionAndCutAreFound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(2, 16).Draw(t, "n")
		list := chain(&testing.T{}, "default", n)
		head := HeadOf(list[n-1])
		i := rapid.IntRange(0, n-1).Draw(t, "i")
		j := rapid.IntRange(0, n-1).Filter(func(j int) bool { return j != i }).Draw(t, "j")

		deleted := slices.Delete(slices.Clone(list), i, i+1)
		wantBreak(t, Verify(deleted, head), uint64(i+1))
		if i < n-1 {
			wantBreak(t, Verify(deleted), uint64(i+1)) // without a pin too
		}

		swapped := slices.Clone(list)
		swapped[i], swapped[j] = swapped[j], swapped[i]
		wantBreak(t, Verify(swapped), uint64(min(i, j)+1))

		doubled := slices.Insert(slices.Clone(list), i, list[i])
		wantBreak(t, Verify(doubled), uint64(i+2))

		cut := list[:i]
		wantBreak(t, Verify(cut, head), uint64(i+1))
		if err := Verify(cut); err != nil {
			t.Fatalf("a prefix is a chain: %v", err)
		}
	})
}

func TestAWholeNewChainIsFoundByThePin(t *testing.T) {
	list := chain(t, "default", 5)
	pin := HeadOf(list[2])
	var head Head
	var forged []Record
	for _, r := range list {
		r.Actor = "user:mallory"
		r, err := Append(head, r)
		if err != nil {
			t.Fatal(err)
		}
		forged, head = append(forged, r), HeadOf(r)
	}
	if err := Verify(forged); err != nil {
		t.Fatalf("the forged chain holds in itself: %v", err)
	}
	wantBreak(t, Verify(forged, pin), 3)
	if err := Verify(list, pin, HeadOf(list[4])); err != nil {
		t.Errorf("the true chain: %v", err)
	}
}

func TestRecordsOfOtherTenantsAreFound(t *testing.T) {
	a, b := chain(t, "a", 3), chain(t, "b", 3)
	wantBreak(t, Verify([]Record{a[0], b[1], a[2]}), 2)
	// A chain that holds, but is another tenant's.
	wantBreak(t, NewVerifier("a", Head{}).Add(b[0]), 1)
	// A record of another tenant that was linked into the chain.
	r := b[1]
	r, err := Append(HeadOf(a[0]), r)
	if err != nil {
		t.Fatal(err)
	}
	wantBreak(t, Verify([]Record{a[0], r}), 2)
}

func TestVerifierGoesOnFromAHead(t *testing.T) {
	list := chain(t, "default", 6)
	v := NewVerifier("default", HeadOf(list[2]))
	for _, r := range list[3:] {
		if err := v.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Finish(); err != nil || v.Head() != HeadOf(list[5]) {
		t.Errorf("head is %v, error %v", v.Head(), err)
	}
	v = NewVerifier("default", HeadOf(list[1]))
	wantBreak(t, v.Add(list[3]), 3)
	wantBreak(t, v.Add(list[2]), 3) // it stays broken
	wantBreak(t, v.Finish(), 3)
	wantBreak(t, NewVerifier("default", HeadOf(list[1]), Head{Count: 2}).Finish(), 2)
}

func TestHeadRoundTrip(t *testing.T) {
	list := chain(t, "default", 2)
	for _, h := range []Head{{}, HeadOf(list[1])} {
		if got, err := ParseHead(h.String()); err != nil || got != h {
			t.Errorf("%s is read as %s, %v", h, got, err)
		}
	}
	good := HeadOf(list[1]).String()
	for _, bad := range []string{"", ":", "2", good + "0", "+" + good, "0" + good, strings.ToUpper(good), "0:" + good[2:], strings.Replace(Head{}.String(), "0:", "1:", 1)} {
		if h, err := ParseHead(bad); err == nil {
			t.Errorf("%q is read as %v", bad, h)
		}
	}
}

func TestExportRoundTrip(t *testing.T) {
	list := chain(t, "default", 20)
	var b bytes.Buffer
	if err := Write(&b, list); err != nil {
		t.Fatal(err)
	}
	again, err := ReadAll(&b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(list, again) {
		t.Error("records changed on the way")
	}
	if err := Verify(again, HeadOf(list[19])); err != nil {
		t.Error(err)
	}
}

// No byte of an export can change, vanish or appear without being noticed.
func TestEveryByteOfAnExportCounts(t *testing.T) {
	list := chain(t, "default", 4)
	var b bytes.Buffer
	if err := Write(&b, list); err != nil {
		t.Fatal(err)
	}
	text, head := b.Bytes(), HeadOf(list[3])
	check := func(what string, at int, changed []byte) {
		got, err := ReadAll(bytes.NewReader(changed))
		if err == nil {
			err = Verify(got, head)
		}
		if err == nil && len(got) == len(list) {
			t.Fatalf("%s at byte %d was not noticed", what, at)
		}
	}
	for i := range text {
		for _, bit := range []byte{1, 0x20, 0x80} {
			c := slices.Clone(text)
			c[i] ^= bit
			check("a changed bit", i, c)
		}
		check("a deleted byte", i, slices.Delete(slices.Clone(text), i, i+1))
		check("an inserted space", i, slices.Insert(slices.Clone(text), i, ' '))
		check("a cut", i, text[:i])
	}
}

func TestReaderIsBounded(t *testing.T) {
	line, err := Line(chain(t, "default", 1)[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string]string{
		"line without end":  string(line[:len(line)-1]),
		"carriage return":   strings.Replace(string(line), "\n", "\r\n", 1),
		"empty line":        "\n",
		"unknown field":     strings.Replace(string(line), `{"seq"`, `{"evil":1,"seq"`, 1),
		"field twice":       strings.Replace(string(line), `{"seq":1`, `{"seq":1,"seq":1`, 1),
		"other case":        strings.Replace(string(line), `"seq"`, `"Seq"`, 1),
		"two records":       strings.TrimSpace(string(line)) + string(line),
		"array":             "[" + strings.TrimSpace(string(line)) + "]\n",
		"endless line":      strings.Repeat("x", MaxLine+2),
		"endless good line": `{"seq":1,"reason":"` + strings.Repeat("x", MaxLine) + `"}` + "\n",
	} {
		if got, err := ReadAll(strings.NewReader(in)); err == nil {
			t.Errorf("%s: read as %d records", name, len(got))
		}
	}
	if got, err := ReadAll(strings.NewReader("")); err != nil || len(got) != 0 {
		t.Errorf("the empty export: %v, %v", got, err)
	}
}

func TestReaderPassesErrorsOn(t *testing.T) {
	boom := errors.New("boom")
	if _, err := ReadAll(io.MultiReader(strings.NewReader(""), failing{boom})); !errors.Is(err, boom) {
		t.Errorf("error is %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestCanonicalJSONIsAFixedPoint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		value := map[string]any{
			rapid.String().Draw(t, "key"): rapid.String().Draw(t, "text"),
			"n":                           rapid.Float64().Draw(t, "n"),
			"<list>":                      rapid.SliceOf(rapid.Int64()).Draw(t, "list"),
		}
		j, err := json.MarshalIndent(value, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		once, err := CanonicalJSON(j)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := CanonicalJSON(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s becomes %s, %v", once, twice, err)
		}
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(once); err != nil || !bytes.Equal(bytes.TrimSpace(b.Bytes()), once) {
			t.Fatalf("encoding/json changes %s to %s", once, b.Bytes())
		}
	})
}

func TestKindsAreDistinctAndWellFormed(t *testing.T) {
	seen := map[Kind]bool{}
	for _, k := range Kinds() {
		if seen[k] {
			t.Errorf("%s is listed twice", k)
		}
		seen[k] = true
		if _, err := Append(Head{}, Record{Tenant: "default", Time: start, Actor: "system", Kind: k, Object: "x/y"}); err != nil {
			t.Errorf("%s: %v", k, err)
		}
	}
}

func FuzzParseLine(f *testing.F) {
	for _, r := range chain(f, "default", 3) {
		line, err := Line(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytes.TrimSpace(line))
	}
	f.Add([]byte(`{"seq":1,"time":"2027-01-01T00:00:00Z","before":null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := ParseLine(line)
		if err != nil {
			return
		}
		again, err := Line(r)
		if err != nil || !bytes.Equal(bytes.TrimSuffix(again, []byte("\n")), line) {
			t.Fatalf("%s is written as %s, %v", line, again, err)
		}
		_ = Verify([]Record{r})
	})
}

func FuzzParseHead(f *testing.F) {
	f.Add(Head{}.String())
	f.Add(HeadOf(chain(f, "default", 1)[0]).String())
	f.Fuzz(func(t *testing.T, s string) {
		if h, err := ParseHead(s); err == nil && h.String() != s {
			t.Fatalf("%q is read as %s", s, h)
		}
	})
}

func FuzzCanonicalJSON(f *testing.F) {
	f.Add([]byte(`{"a": "<\u2028>"}`))
	f.Add([]byte(` [1, 2.50e3, null, "\ud800"] `))
	f.Fuzz(func(t *testing.T, j []byte) {
		once, err := CanonicalJSON(j)
		if err != nil {
			return
		}
		twice, err := CanonicalJSON(once)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%s becomes %s, %v", once, twice, err)
		}
		if marshalled, err := json.Marshal(once); len(once) > 0 && (err != nil || !bytes.Equal(marshalled, once)) {
			t.Fatalf("encoding/json changes %s to %s, %v", once, marshalled, err)
		}
	})
}
