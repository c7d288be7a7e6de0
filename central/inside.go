package central

import (
	"net/http"

	"github.com/muster-edge/muster/central/console"
	"github.com/muster-edge/muster/fleet/access"
)

// Inside returns a transport that calls the management API of this very
// process, as the principal in the request's context (access.NewContext). The
// console is such a client: it goes through the same gate, the same methods
// and the same codes as everybody, with no socket between.
//
//	client := musterv1connect.NewManagementServiceClient(&http.Client{Transport: s.Inside()}, "http://inside")
//	answer, err := client.ListNodes(access.NewContext(r.Context(), principal), &musterv1.ListNodesRequest{})
func (s *Server) Inside() http.RoundTripper {
	return inside{console.InProcess(s.managementHandler(), func(v any, stack []byte) {
		s.log.Error("call inside failed", "panic", v, "stack", string(stack))
	})}
}

type inside struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (i inside) RoundTrip(r *http.Request) (*http.Response, error) {
	if _, ok := access.FromContext(r.Context()); !ok {
		// Else the gate would look for a bearer token, and the mistake would
		// look like one of the user's.
		return nil, errNoPrincipal
	}
	return i.next.RoundTrip(r)
}
