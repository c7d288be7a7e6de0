package lab

import (
	"bytes"
	"testing"
)

func TestTag(t *testing.T) {
	frame := []byte("\x01\x02\x03\x04\x05\x06\x11\x12\x13\x14\x15\x16\x08\x00payload")
	on := tag(nil, frame, 42)
	if want := []byte("\x01\x02\x03\x04\x05\x06\x11\x12\x13\x14\x15\x16\x81\x00\x00\x2a\x08\x00payload"); !bytes.Equal(on, want) {
		t.Errorf("%x, want %x", on, want)
	}
	for what, c := range map[string]struct {
		frame []byte
		vlan  uint16
		ok    bool
	}{
		"its own VLAN":      {on, 42, true},
		"another one":       {on, 43, false},
		"no tag":            {frame, 42, false},
		"a tag, cut off":    {on[:16], 42, false},
		"a priority, too":   {append(append(bytes.Clone(on[:14]), 0xe0, 42), on[16:]...), 42, true},
		"nothing":           {nil, 42, false},
		"another kind (ad)": {append(append(bytes.Clone(on[:12]), 0x88, 0xa8), on[14:]...), 42, false},
	} {
		got, ok := untag(bytes.Clone(c.frame), c.vlan)
		if ok != c.ok || ok && !bytes.Equal(got, frame) {
			t.Errorf("%s: %x, %v", what, got, ok)
		}
	}
	if tag(nil, frame[:13], 42) != nil {
		t.Error("a frame that ends in its header got a tag")
	}
}
