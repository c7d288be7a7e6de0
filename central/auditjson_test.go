package central

import (
	"testing"

	"github.com/muster-edge/muster/fleet"
)

// The first grant of a site has nothing before it: a nil pointer, which the
// audit log refused as a bare null, so that no site could be founded.
func TestAuditJSON(t *testing.T) {
	var nothing *fleet.FoundingGrant
	for _, v := range []any{nil, nothing} {
		if b, err := auditJSON(v); b != nil || err != nil {
			t.Errorf("%T: %q, %v", v, b, err)
		}
	}
	if b, err := auditJSON(&fleet.FoundingGrant{UID: "u"}); len(b) < 10 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := auditJSON(func() {}); err == nil {
		t.Error("a function is JSON")
	}
}
