package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/restmapper"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// manifests applies the plain YAML below server/manifests, as the elected
// server of k3s does every 15 s. Charts and Addons are not tracked.
type manifests struct {
	dir  string
	done map[string][32]byte
}

func newManifests(dir string) *manifests { return &manifests{dir, map[string][32]byte{}} }

func (m *manifests) run(ctx context.Context, k *kube) {
	for {
		files, _ := filepath.Glob(filepath.Join(m.dir, "*.y*ml"))
		for _, f := range files {
			if _, err := os.Stat(f + ".skip"); err == nil {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				continue
			}
			sum := sha256.Sum256(b)
			if m.done[f] == sum {
				continue
			}
			if err := apply(ctx, k, b); err != nil {
				proc.Error("Failed to process config: failed to process %s: %v", f, err)
				continue
			}
			m.done[f] = sum
		}
		if !proc.Sleep(ctx, 15*time.Second) {
			return
		}
	}
}

func apply(ctx context.Context, k *kube, b []byte) error {
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(k.c.Discovery()))
	dec := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096)
	for {
		var u unstructured.Unstructured
		if err := dec.Decode(&u.Object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if len(u.Object) == 0 {
			continue
		}
		mp, err := mapper.RESTMapping(u.GroupVersionKind().GroupKind(), u.GroupVersionKind().Version)
		if err != nil {
			return err
		}
		r := k.dyn.Resource(mp.Resource)
		data, err := u.MarshalJSON()
		if err != nil {
			return err
		}
		force := true
		opt := metav1.PatchOptions{FieldManager: "deploy@standin", Force: &force}
		if mp.Scope.Name() == meta.RESTScopeNameNamespace {
			ns := u.GetNamespace()
			if ns == "" {
				ns = metav1.NamespaceDefault
			}
			_, err = r.Namespace(ns).Patch(ctx, u.GetName(), types.ApplyPatchType, data, opt)
		} else {
			_, err = r.Patch(ctx, u.GetName(), types.ApplyPatchType, data, opt)
		}
		if err != nil {
			return err
		}
	}
}
