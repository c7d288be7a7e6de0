package conf

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	yaml "go.yaml.in/yaml/v3"
)

// DefaultConfig is where the configuration is read when nothing else is said.
const DefaultConfig = "/etc/rancher/k3s/config.yaml"

// configFile finds the file to read and whether it was named.
func configFile(args []string) (string, bool) {
	for i, a := range args {
		for _, p := range []string{"--config", "-config", "-c", "--c"} {
			if a == p && i+1 < len(args) {
				return args[i+1], true
			}
			if rest, ok := strings.CutPrefix(a, p+"="); ok {
				return rest, true
			}
		}
	}
	if e := os.Getenv("K3S_CONFIG_FILE"); e != "" {
		return e, true
	}
	return DefaultConfig, false
}

// entry is one key of a file, in the order of the file.
type entry struct {
	key    string
	values []string
}

// configArgs turns the files into arguments.
func configArgs(role string, args []string, warn func(string)) ([]string, error) {
	file, named := configFile(args)
	if strings.HasPrefix(file, "http://") || strings.HasPrefix(file, "https://") {
		return nil, fmt.Errorf("%w: the stand-in reads no configuration from a URL", ErrUsage)
	}
	var files []string
	if _, err := os.Stat(file); err == nil {
		files = append(files, file)
	} else if named && !os.IsNotExist(err) {
		return nil, err
	}
	drop, err := filepath.Glob(filepath.Join(file+".d", "*"))
	if err != nil {
		return nil, err
	}
	sort.Strings(drop)
	for _, d := range drop {
		if ext := filepath.Ext(d); ext == ".yaml" || ext == ".yml" {
			files = append(files, d)
		}
	}
	if named && len(files) == 0 {
		return nil, fmt.Errorf("stat %s: no such file or directory", file)
	}
	var all []entry
	for _, f := range files {
		es, err := readFile(f)
		if err != nil {
			return nil, err
		}
		all = merge(all, es)
	}
	var out []string
	for _, e := range all {
		if role == "server" && !known(role, e.key) {
			warn(fmt.Sprintf("Unknown flag --%s found in config.yaml, skipping", e.key))
			continue
		}
		for _, v := range e.values {
			out = append(out, "--"+e.key+"="+v)
		}
	}
	return out, nil
}

// merge adds a later file: its keys replace, keys that end in "+" append.
func merge(all, later []entry) []entry {
	for _, e := range later {
		key, add := strings.CutSuffix(e.key, "+")
		i := slices.IndexFunc(all, func(x entry) bool { return x.key == key })
		switch {
		case i < 0:
			all = append(all, entry{key, e.values})
		case add:
			all[i].values = append(all[i].values, e.values...)
		default:
			all[i].values = e.values
		}
	}
	return all
}

func readFile(path string) ([]entry, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseYAML(path, b)
}

func parseYAML(path string, b []byte) ([]entry, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(doc.Content) == 0 {
		return nil, nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%s: not a mapping", path)
	}
	var out []entry
	for i := 0; i+1 < len(root.Content); i += 2 {
		e := entry{key: root.Content[i].Value}
		switch n := root.Content[i+1]; n.Kind {
		case yaml.SequenceNode:
			for _, c := range n.Content {
				e.values = append(e.values, c.Value)
			}
		case yaml.ScalarNode:
			if n.Tag == "!!null" {
				continue
			}
			e.values = []string{n.Value}
		default:
			return nil, fmt.Errorf("%s: value of %s is neither text nor a list", path, e.key)
		}
		out = append(out, e)
	}
	return out, nil
}
