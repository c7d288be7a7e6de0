package k3s

import (
	"net/http"
	"testing"
)

func TestForgetPassword(t *testing.T) {
	m, _ := newManager(t)
	a := newAPI(t, m)
	var asked []string
	a.mux.HandleFunc("/api/v1/namespaces/kube-system/secrets/", func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.Path)
		if len(asked) > 1 {
			w.WriteHeader(http.StatusNotFound) // it never had one
		}
	})
	for range 2 {
		if err := m.ForgetPassword(t.Context(), idB); err != nil {
			t.Fatal(err)
		}
	}
	if want := "DELETE /api/v1/namespaces/kube-system/secrets/" + string(idB) + ".node-password.k3s"; len(asked) != 2 || asked[0] != want {
		t.Errorf("asked %q, want %q", asked, want)
	}
	if err := m.ForgetPassword(t.Context(), "../nodes/x"); err == nil || len(asked) != 2 {
		t.Errorf("a name that is no node's was asked for: %v", asked)
	}
}
