// Package fleettest fills values of package fleet with random content, for
// property tests that send objects through JSON, protobuf or a database and
// compare what comes back. It reaches new fields by itself.
package fleettest

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"time"

	"pgregory.net/rapid"

	"github.com/muster-edge/muster/fleet"
)

// Draw returns a T with every field drawn at random: strings of valid UTF-8,
// UTC times of whole microseconds, digests of 32 bytes, only values that enums
// have, lists and maps of at most 3 elements that are nil when empty. It need
// not be valid.
func Draw[T any](t *rapid.T) T {
	var v T
	fill(t, reflect.ValueOf(&v).Elem(), reflect.TypeFor[T]().Name())
	return v
}

func fill(t *rapid.T, v reflect.Value, name string) {
	switch v.Interface().(type) {
	case time.Time:
		if rapid.Bool().Draw(t, name+" set") {
			µs := rapid.Int64Range(1, 1<<52).Draw(t, name)
			v.Set(reflect.ValueOf(time.UnixMicro(µs).UTC()))
		}
		return
	case json.RawMessage:
		if rapid.Bool().Draw(t, name+" set") {
			v.SetBytes(fmt.Appendf(nil, `{"n":%d}`, rapid.Int().Draw(t, name)))
		}
		return
	case fleet.HexBytes, []byte:
		if rapid.Bool().Draw(t, name+" set") {
			v.SetBytes(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, name))
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), name+"."+v.Type().Field(i).Name)
		}
	case reflect.Pointer:
		if rapid.Bool().Draw(t, name+" set") {
			v.Set(reflect.New(v.Type().Elem()))
			fill(t, v.Elem(), name)
		}
	case reflect.Slice:
		for range rapid.IntRange(0, 3).Draw(t, name+" count") {
			e := reflect.New(v.Type().Elem()).Elem()
			fill(t, e, name)
			if e.Kind() == reflect.Slice && e.IsNil() {
				e.SetBytes([]byte{1})
			}
			v.Set(reflect.Append(v, e))
		}
	case reflect.Map:
		fillMap(t, v, name)
	case reflect.Array:
		if rapid.Bool().Draw(t, name+" set") {
			reflect.Copy(v, reflect.ValueOf(rapid.SliceOfN(rapid.Byte(), v.Len(), v.Len()).Draw(t, name)))
		}
	case reflect.String:
		v.SetString(rapid.StringN(0, 8, 32).Draw(t, name))
	case reflect.Bool:
		v.SetBool(rapid.Bool().Draw(t, name))
	case reflect.Uint8:
		v.SetUint(uint64(rapid.IntRange(0, lastOf(v.Type())).Draw(t, name)))
	case reflect.Uint32:
		v.SetUint(uint64(rapid.Uint32().Draw(t, name)))
	case reflect.Uint64:
		v.SetUint(rapid.Uint64().Draw(t, name))
	case reflect.Int:
		v.SetInt(int64(rapid.Int32().Draw(t, name)))
	case reflect.Int64:
		v.SetInt(rapid.Int64().Draw(t, name))
	default:
		t.Fatalf("fleettest: %s has the kind %s, which nobody has taught me", name, v.Kind())
	}
}

func fillMap(t *rapid.T, v reflect.Value, name string) {
	for range rapid.IntRange(0, 3).Draw(t, name+" count") {
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		if key.Kind() == reflect.Int { // numbers of PCRs
			key.SetInt(int64(rapid.IntRange(0, 23).Draw(t, name)))
		} else {
			fill(t, key, name)
		}
		fill(t, value, name)
		if value.Kind() == reflect.Slice && value.IsNil() {
			value.SetBytes(make([]byte, 32))
		}
		v.SetMapIndex(key, value)
	}
}

// lastOf finds the last value of an enum: the one before the first that has
// no text form.
func lastOf(enum reflect.Type) int {
	for i := range 256 {
		v := reflect.New(enum).Elem()
		v.SetUint(uint64(i))
		m, ok := v.Interface().(encoding.TextMarshaler)
		if !ok {
			return 255
		}
		if _, err := m.MarshalText(); err != nil {
			return i - 1
		}
	}
	return 255
}
