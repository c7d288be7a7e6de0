package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// SnapshotRequest is the body of POST /db/snapshot.
type SnapshotRequest struct {
	Operation string   `json:"operation"` // save, list or delete
	Name      []string `json:"name,omitempty"`
	Dir       *string  `json:"dir,omitempty"`
	Retention *int     `json:"retention,omitempty"`
}

// SnapshotFile is one snapshot in an answer.
type SnapshotFile struct {
	Name     string    `json:"name"`
	Location string    `json:"location"`
	Size     int64     `json:"size"`
	Created  time.Time `json:"created"`
}

// SnapshotAnswer is the answer to a SnapshotRequest.
type SnapshotAnswer struct {
	Created []SnapshotFile `json:"created,omitempty"`
	Deleted []SnapshotFile `json:"deleted,omitempty"`
	Files   []SnapshotFile `json:"files,omitempty"`
}

func (s *supervisor) snapshot(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		status(w, http.StatusMethodNotAllowed, "method not allowed")
		return
	}
	var req SnapshotRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&req); err != nil {
		status(w, http.StatusBadRequest, err.Error())
		return
	}
	dir := s.cfg.Str("etcd-snapshot-dir")
	if req.Dir != nil && *req.Dir != "" {
		dir = *req.Dir
	}
	if dir == "" {
		dir = s.cfg.ServerDir("db", "snapshots")
	}
	var ans SnapshotAnswer
	var err error
	switch req.Operation {
	case "save":
		name := "on-demand"
		if len(req.Name) > 0 && req.Name[0] != "" {
			name = req.Name[0]
		}
		var f SnapshotFile
		if f, err = s.save(r.Context(), dir, name); err == nil {
			ans.Created = []SnapshotFile{f}
		}
	case "list":
		ans.Files, err = listSnapshots(dir)
	case "delete":
		var all []SnapshotFile
		all, err = listSnapshots(dir)
		for _, f := range all {
			for _, n := range req.Name {
				if f.Name == n {
					if err = os.Remove(filepath.Join(dir, f.Name)); err == nil {
						ans.Deleted = append(ans.Deleted, f)
						s.forget(r.Context(), f.Name)
					}
				}
			}
		}
	default:
		status(w, http.StatusBadRequest, "invalid operation")
		return
	}
	if err != nil {
		status(w, http.StatusInternalServerError, err.Error())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(ans)
}

// save writes one snapshot, complete or not at all.
func (s *supervisor) save(ctx context.Context, dir, name string) (SnapshotFile, error) {
	var f SnapshotFile
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return f, err
	}
	f.Created = time.Now().UTC().Truncate(time.Second)
	f.Name = fmt.Sprintf("%s-%s-%d", name, s.cfg.NodeName, f.Created.Unix())
	path := filepath.Join(dir, f.Name)
	f.Location = "file://" + path
	proc.Info("Saving etcd snapshot to %s", path)
	rc, err := s.store.Client().Snapshot(ctx)
	if err != nil {
		return f, err
	}
	defer rc.Close()
	out, err := os.OpenFile(path+".part", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return f, err
	}
	f.Size, err = io.Copy(out, rc)
	if err == nil {
		err = out.Sync()
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(path+".part", path)
	}
	if err != nil {
		_ = os.Remove(path + ".part")
		return f, err
	}
	s.record(ctx, f)
	return f, nil
}

func listSnapshots(dir string) ([]SnapshotFile, error) {
	es, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	var out []SnapshotFile
	for _, e := range es {
		st, err := e.Info()
		if err != nil || !st.Mode().IsRegular() || strings.HasSuffix(e.Name(), ".part") {
			continue
		}
		out = append(out, SnapshotFile{e.Name(), "file://" + filepath.Join(dir, e.Name()), st.Size(), st.ModTime().UTC()})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

var snapshotGVR = schema.GroupVersionResource{Group: "k3s.cattle.io", Version: "v1", Resource: "etcdsnapshotfiles"}

func (s *supervisor) crName(file string) string { return "local-" + strings.ToLower(file) }

// record makes the ETCDSnapshotFile; a failure is only logged, as the file counts.
func (s *supervisor) record(ctx context.Context, f SnapshotFile) {
	k := s.kube.Load()
	if k == nil {
		return
	}
	u := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "k3s.cattle.io/v1", "kind": "ETCDSnapshotFile",
		"metadata": map[string]any{"name": s.crName(f.Name)},
		"spec":     map[string]any{"snapshotName": f.Name, "nodeName": s.cfg.NodeName, "location": f.Location},
		"status":   map[string]any{"readyToUse": true, "size": f.Size, "creationTime": f.Created.Format(time.RFC3339)},
	}}
	if _, err := k.dyn.Resource(snapshotGVR).Create(ctx, u, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		proc.Warn("record snapshot: %v", err)
	}
}

func (s *supervisor) forget(ctx context.Context, file string) {
	if k := s.kube.Load(); k != nil {
		if err := k.dyn.Resource(snapshotGVR).Delete(ctx, s.crName(file), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			proc.Warn("forget snapshot: %v", err)
		}
	}
}

// schedule takes snapshots by etcd-snapshot-schedule-cron and keeps the newest
// etcd-snapshot-retention of them.
func (s *supervisor) schedule(ctx context.Context) {
	if s.cfg.Bool("etcd-disable-snapshots") {
		return
	}
	sched, err := cron.ParseStandard(s.cfg.Str("etcd-snapshot-schedule-cron"))
	if err != nil {
		proc.Error("etcd-snapshot-schedule-cron: %v", err)
		return
	}
	for proc.Sleep(ctx, time.Until(sched.Next(time.Now()))) {
		dir := s.cfg.Str("etcd-snapshot-dir")
		if dir == "" {
			dir = s.cfg.ServerDir("db", "snapshots")
		}
		if err := s.scheduled(ctx, dir); err != nil {
			proc.Error("Failed to take scheduled snapshot: %v", err)
		}
	}
}

func (s *supervisor) scheduled(ctx context.Context, dir string) error {
	name := s.cfg.Str("etcd-snapshot-name")
	if _, err := s.save(ctx, dir, name); err != nil {
		return err
	}
	keep, err := strconv.Atoi(s.cfg.Str("etcd-snapshot-retention"))
	if err != nil {
		return err
	}
	all, err := listSnapshots(dir)
	if err != nil || keep < 1 {
		return err
	}
	all = slices.DeleteFunc(all, func(f SnapshotFile) bool { return !strings.HasPrefix(f.Name, name+"-"+s.cfg.NodeName+"-") })
	sort.Slice(all, func(i, j int) bool { return all[i].Created.After(all[j].Created) })
	for _, f := range all[min(keep, len(all)):] {
		if err := os.Remove(filepath.Join(dir, f.Name)); err != nil {
			return err
		}
		s.forget(ctx, f.Name)
	}
	return nil
}
