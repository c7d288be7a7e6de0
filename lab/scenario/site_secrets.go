package scenario

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/muster-edge/muster/lab"
)

// clusterSecrets are the secrets of the cluster that b is a server of: what
// nobody but servers may have.
func (b *box) clusterSecrets() ([]canary, error) {
	return secretsBelow(b.Files(), b.Name())
}

// secretsBelow collects them from the files of a server.
func secretsBelow(root, name string) ([]canary, error) {
	var out []canary
	data := root + k3sData
	token, err := os.ReadFile(data + "/server/token")
	if err != nil {
		return nil, fmt.Errorf("scenario: read server token of %s: %w", name, err)
	}
	// K10<hash>::server:<secret>; the hash is public.
	text := strings.TrimSpace(string(token))
	secret := text[strings.LastIndex(text, ":")+1:]
	if len(secret) < 16 {
		return nil, fmt.Errorf("scenario: read server token of %s: a secret of %d characters", name, len(secret))
	}
	out = append(out, canary{"the server token of " + name, []byte(secret)})
	err = filepath.WalkDir(data+"/server/tls", func(path string, d fs.DirEntry, err error) error {
		file := filepath.Base(path)
		if err != nil || !d.Type().IsRegular() || !strings.HasSuffix(file, "-ca.key") && file != "service.key" {
			return err
		}
		key, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		lines := strings.Split(strings.TrimSpace(string(key)), "\n")
		if len(lines) < 3 {
			return fmt.Errorf("%s is no key", path)
		}
		out = append(out, canary{file + " of " + name, []byte(lines[len(lines)/2])})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("scenario: collect secrets of %s: %w", name, err)
	}
	if len(out) < 4 {
		return nil, fmt.Errorf("scenario: collect secrets of %s: only %d found", name, len(out))
	}
	return out, nil
}

// privatePlaces are the directories of a node that hold what it knows, on its
// disk and in its memory.
var privatePlaces = []string{"/var", "/etc/rancher", "/etc/muster", "/run", "/tmp", "/root"}

// holds returns an error for each secret that is on the node.
func (b *box) holds(secrets []canary) error {
	root := b.Files()
	if root == "" {
		return fmt.Errorf("scenario: search %s: it is off", b.Name())
	}
	return secretsIn(root, b.Name(), secrets)
}

func secretsIn(root, name string, secrets []canary) error {
	var hits []error
	for _, place := range privatePlaces {
		err := filepath.WalkDir(root+place, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist): // files come and go
				return nil
			case err != nil || !d.Type().IsRegular():
				return err
			}
			info, err := d.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if info.Size() > maxScan {
				return fmt.Errorf("%s has %d bytes, too many to search", path, info.Size())
			}
			text, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			for _, s := range secrets {
				if bytes.Contains(text, s.bytes) {
					hits = append(hits, fmt.Errorf("%s holds %s in %s", name, s.name, strings.TrimPrefix(path, root)))
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("scenario: search %s: %w", name, err)
		}
	}
	return errors.Join(hits...)
}

// checkSecrets searches for the cluster's secrets wherever they must not be:
// on workers and strangers, in logs and captures, in command lines. The same
// search must find them where they belong.
func (s *shop) checkSecrets() error {
	v := s.watch.now()
	servers := v.with(s, roleServer)
	if len(servers) == 0 && s.l.Spec.Never {
		s.l.Site(func(r *lab.SiteResult) {
			r.Remarks = append(r.Remarks, "the only server is gone for good: there was nobody to learn the secrets from, and they were not searched for")
		})
		return nil
	}
	if len(servers) == 0 {
		return s.l.Check("secrets stay where they belong", errors.New("there is no server to learn them from"))
	}
	var secrets []canary
	for _, b := range servers {
		list, err := b.clusterSecrets()
		if err != nil {
			return s.l.Check("secrets stay where they belong", err)
		}
		for _, x := range list { // servers share most of them
			if !slices.ContainsFunc(secrets, func(y canary) bool { return bytes.Equal(x.bytes, y.bytes) }) {
				secrets = append(secrets, x)
			}
		}
	}
	if err := servers[0].holds(secrets); err == nil {
		return s.l.Check("the search for secrets finds them on a server", errors.New("it finds nothing"))
	}
	var errs []error
	searched := 0
	for _, b := range s.nodes {
		if _, on := b.On(); on && v.role(b) != roleServer && v.role(b) != roleCandidate {
			errs = append(errs, b.holds(secrets))
			searched++
		}
	}
	if searched == 0 && len(s.nodes) > 3 {
		errs = append(errs, errors.New("there was no such node to search"))
	}
	if searched > 0 || len(errs) > 0 {
		if err := s.l.Check(fmt.Sprintf("no cluster secret is on the disk or in the memory files of the %d nodes that are no servers", searched), errors.Join(errs...)); err != nil {
			return err
		}
	}
	logs, err := s.logs()
	if err == nil {
		err = search(secrets, logs...)
	}
	if err := s.l.Check("no cluster secret is in logs, captures, commands or events", err); err != nil {
		return err
	}
	return s.l.Check("no cluster secret is in a command line", searchCommandLines(secrets))
}

// logs are the files of a run that people may hand on, captures included.
func (s *shop) logs() ([]string, error) {
	var out []string
	for _, pattern := range []string{"*.log", "*.jsonl", "node*/*.log", "node*/*.pcap"} {
		found, err := filepath.Glob(s.l.Path(pattern))
		if err != nil {
			return nil, fmt.Errorf("scenario: list logs: %w", err)
		}
		out = append(out, found...)
	}
	if len(out) < 3 {
		return nil, fmt.Errorf("scenario: list logs: only %d found", len(out))
	}
	return out, nil
}
