package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// A setting is one value with where it came from, for `muster config show`.
type setting struct {
	Name   string `json:"name"`
	Value  any    `json:"value"`
	Source string `json:"source"`
}

// notConfigured are flags that make no sense in a file.
var notConfigured = []string{"help", "config", "version"}

// resolve fills the command's flags from, in this order of precedence: the
// command line, MUSTER_* in the environment, the YAML file, the defaults. It
// returns what holds. A file may have keys of other commands; keys that no
// flag has are listed in an error by the caller who knows them all.
func resolve(cmd *cobra.Command, file string) ([]setting, error) {
	k := koanf.New("\x00") // names hold no such delimiter
	source := make(map[string]string)
	load := func(values map[string]any, from func(string) string) error {
		for name := range values {
			source[name] = from(name)
		}
		return k.Load(confmap.Provider(values, "\x00"), nil)
	}
	defaults, env, line := map[string]any{}, map[string]any{}, map[string]any{}
	var flags []*pflag.Flag
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if slices.Contains(notConfigured, f.Name) {
			return
		}
		flags = append(flags, f)
		defaults[f.Name] = valueOf(f)
		if v, there := os.LookupEnv(envName(f.Name)); there {
			env[f.Name] = v
		}
		if f.Changed {
			line[f.Name] = valueOf(f)
		}
	})
	inFile, err := readConfigFile(file)
	if err != nil {
		return nil, err
	}
	for name := range inFile {
		if _, known := defaults[name]; !known {
			return nil, exitError{2, fmt.Errorf("%s: there is no setting %q; `muster config show` lists them", file, name)}
		}
	}
	for _, l := range []struct {
		values map[string]any
		from   func(string) string
	}{
		{defaults, func(string) string { return "default" }},
		{inFile, func(string) string { return "file " + file }},
		{env, func(n string) string { return "environment " + envName(n) }},
		{line, func(n string) string { return "flag --" + n }},
	} {
		if err := load(l.values, l.from); err != nil {
			return nil, fmt.Errorf("read settings: %w", err)
		}
	}
	var out []setting
	for _, f := range flags {
		if !f.Changed && source[f.Name] != "default" {
			if err := setFlag(f, k.Get(f.Name)); err != nil {
				return nil, exitError{2, fmt.Errorf("setting %s (%s): %w", f.Name, source[f.Name], err)}
			}
		}
		out = append(out, setting{f.Name, valueOf(f), source[f.Name]})
	}
	return out, nil
}

func envName(flag string) string {
	return "MUSTER_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func valueOf(f *pflag.Flag) any {
	if s, ok := f.Value.(pflag.SliceValue); ok {
		return s.GetSlice()
	}
	return f.Value.String()
}

func setFlag(f *pflag.Flag, v any) error {
	s, many := f.Value.(pflag.SliceValue)
	switch v := v.(type) {
	case []any:
		if !many {
			return errors.New("want one value, not a list")
		}
		values := make([]string, len(v))
		for i, e := range v {
			values[i] = fmt.Sprint(e)
		}
		return s.Replace(values)
	case string:
		if many {
			return s.Replace(strings.Split(v, ","))
		}
		return f.Value.Set(v)
	default:
		return f.Value.Set(fmt.Sprint(v))
	}
}

// readConfigFile reads a flat YAML map. No file name: no settings.
func readConfigFile(file string) (map[string]any, error) {
	if file == "" {
		return map[string]any{}, nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, exitError{2, fmt.Errorf("read settings: %w", err)}
	}
	values := map[string]any{}
	if err := yaml.Unmarshal(b, &values); err != nil {
		return nil, exitError{2, fmt.Errorf("read settings in %s: %w", file, err)}
	}
	for name, v := range values {
		if _, nested := v.(map[string]any); nested {
			return nil, exitError{2, fmt.Errorf("%s: %q holds a map; settings are flat, named like the flags", file, name)}
		}
	}
	return values, nil
}

// userConfig is ~/.config/muster/config.yaml, or "" if it is not there.
func userConfig() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	name := filepath.Join(dir, "muster", "config.yaml")
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return name
}
