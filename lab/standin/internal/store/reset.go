package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"github.com/muster-edge/muster/lab/standin/internal/proc"
)

// CheckReset refuses a second reset before a normal start.
func (s *Store) CheckReset() error {
	if _, err := os.Stat(s.ResetFlag()); err == nil {
		return fmt.Errorf("Managed etcd cluster membership was previously reset, please remove the cluster-reset flag and start k3s normally. If you need to perform another cluster reset, you must first manually delete the file at %s", s.ResetFlag())
	}
	return nil
}

// RestoreFile replaces the database by a snapshot; the old one is kept beside
// it. The hash in the snapshot is checked.
func (s *Store) RestoreFile(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("etcd: snapshot path does not exist: %s", path)
	}
	if st.IsDir() {
		return fmt.Errorf("etcd: snapshot path must be a file, not a directory: %s", path)
	}
	if _, err := os.Stat(s.Dir()); err == nil {
		old := fmt.Sprintf("%s-old-%d", s.Dir(), time.Now().Unix())
		if err := os.Rename(s.Dir(), old); err != nil {
			return err
		}
		proc.Info("Pre-restore etcd database moved to %s", old)
	}
	if s.name == "" {
		if err := s.SetName(true); err != nil {
			return err
		}
		if err := os.RemoveAll(s.Dir()); err != nil {
			return err
		}
	}
	return snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath: path, Name: s.name, OutputDataDir: s.Dir(), OutputWALDir: s.walDir(),
		PeerURLs: []string{s.peerURL()}, InitialCluster: s.name + "=" + s.peerURL(), InitialClusterToken: "etcd-cluster",
	})
}

// Reset makes this member the only one, keeping the data, and deletes what
// would keep the node itself out.
func (s *Store) Reset(ctx context.Context) error {
	if err := s.SetName(true); err != nil {
		return err
	}
	if err := os.WriteFile(s.ResetFlag(), nil, 0o600); err != nil {
		return err
	}
	if err := s.start(ctx, "", "", true); err != nil {
		return err
	}
	c := s.Client()
	for {
		if err := func() error {
			ctx, cancel := context.WithTimeout(ctx, testTimeout)
			defer cancel()
			ml, err := c.MemberList(ctx)
			if err != nil {
				return err
			}
			if len(ml.Members) != 1 {
				return errors.New("etcd still has more than one member")
			}
			if _, err := c.MemberUpdate(ctx, ml.Members[0].ID, []string{s.peerURL()}); err != nil {
				return err
			}
			if _, err := c.Put(ctx, "k3s/apiaddresses", ""); err != nil {
				return err
			}
			_, err = c.Delete(ctx, "/registry/secrets/kube-system/"+s.cfg.NodeName+".node-password.k3s")
			return err
		}(); err == nil {
			if err = s.Test(ctx); err == nil {
				return nil
			}
			proc.Info("Failed to test etcd connection: %v", err)
		} else {
			proc.Warn("failed to reset etcd membership: %v", err)
		}
		if !proc.Sleep(ctx, settle) {
			return ctx.Err()
		}
	}
}
