package kmod

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"strings"
)

// Caps for the files that depmod writes and for aliases from devices.
const (
	maxModuleFile  = 32 << 20
	maxAlias       = 512
	maxModules     = 20000
	maxModuleDepth = 64
)

// moduleIndex knows which module serves which device, and what it needs.
type moduleIndex struct {
	// paths maps a module's name (with '_') to its path below /lib/modules/VER.
	paths map[string]string
	// deps maps a path to the paths it needs, most basic last.
	deps map[string][]string
	// aliases holds patterns by the part before the first ':' ("pci", "usb",
	// "acpi", ...), since there are tens of thousands.
	aliases map[string][]alias
}

type alias struct{ pattern, module string }

// parseModules reads modules.dep and modules.alias (man 5 modules.dep;
// modules.alias has lines "alias PATTERN MODULE").
func parseModules(dep, aliases []byte) (*moduleIndex, error) {
	if len(dep) > maxModuleFile || len(aliases) > maxModuleFile {
		return nil, errors.New("kmod: read module lists: too long")
	}
	x := &moduleIndex{paths: map[string]string{}, deps: map[string][]string{}, aliases: map[string][]alias{}}
	for line := range bytes.Lines(dep) {
		file, needs, ok := strings.Cut(string(line), ":")
		file = strings.TrimSpace(file)
		if !ok || !localPath(file) {
			continue
		}
		if len(x.deps) >= maxModules {
			return nil, fmt.Errorf("kmod: read modules.dep: more than %d modules", maxModules)
		}
		var list []string
		for _, n := range strings.Fields(needs) {
			if localPath(n) {
				list = append(list, n)
			}
		}
		x.deps[file] = list
		x.paths[moduleName(file)] = file
	}
	for line := range bytes.Lines(aliases) {
		f := strings.Fields(string(line))
		if len(f) != 3 || f[0] != "alias" || len(f[1]) > maxAlias {
			continue
		}
		bus, _, _ := strings.Cut(f[1], ":")
		x.aliases[bus] = append(x.aliases[bus], alias{f[1], dashes(f[2])})
	}
	return x, nil
}

// localPath keeps a list from naming files outside the module tree.
func localPath(p string) bool {
	return p != "" && len(p) < 256 && !path.IsAbs(p) && path.Clean(p) == p && !strings.HasPrefix(p, "..") && strings.Contains(path.Base(p), ".ko")
}

// moduleName is a file's module name: the kernel knows '_' only.
func moduleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".ko")
	return dashes(base)
}

func dashes(s string) string { return strings.ReplaceAll(s, "-", "_") }

// lookup returns the names of the modules for a device's modalias.
func (x *moduleIndex) lookup(modalias string) []string {
	if modalias == "" || len(modalias) > maxAlias {
		return nil
	}
	bus, _, _ := strings.Cut(modalias, ":")
	var out []string
	for _, a := range x.aliases[bus] {
		if matchAlias(a.pattern, modalias) {
			out = append(out, a.module)
		}
	}
	return out
}

// closure lists the files to load for a module, dependencies first.
func (x *moduleIndex) closure(name string) ([]string, error) {
	file, ok := x.paths[dashes(name)]
	if !ok {
		return nil, fmt.Errorf("kmod: module %q is not in this image", name)
	}
	var out []string
	seen := map[string]bool{}
	var walk func(file string, depth int) error
	walk = func(file string, depth int) error {
		if seen[file] {
			return nil
		}
		if depth > maxModuleDepth {
			return fmt.Errorf("kmod: dependencies of module %q are nested too deep", name)
		}
		seen[file] = true // a cycle ends here: the kernel will say what is missing
		for _, d := range x.deps[file] {
			if err := walk(d, depth+1); err != nil {
				return err
			}
		}
		out = append(out, file)
		return nil
	}
	if err := walk(file, 0); err != nil {
		return nil, err
	}
	return out, nil
}

// matchAlias is fnmatch(3) with '*', '?' and '[...]', as the kernel's device
// tables use it. '-' and '_' are the same outside brackets. It needs at most
// len(pattern)*len(s) steps.
func matchAlias(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, i
			p++
			continue
		}
		if n := matchOne(pattern[p:], s[i]); n > 0 {
			p += n
			i++
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, i = star+1, mark
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// matchOne matches c against the first element of pattern and returns the
// element's length, or 0.
func matchOne(pattern string, c byte) int {
	if pattern == "" {
		return 0
	}
	switch pattern[0] {
	case '?':
		return 1
	case '[':
		return matchSet(pattern, c)
	}
	if pattern[0] == c || dash(pattern[0]) && dash(c) {
		return 1
	}
	return 0
}

func dash(c byte) bool { return c == '-' || c == '_' }

func matchSet(pattern string, c byte) int {
	end := strings.IndexByte(pattern, ']')
	if end < 0 {
		return 0
	}
	set := pattern[1:end]
	not := set != "" && (set[0] == '!' || set[0] == '^')
	if not {
		set = set[1:]
	}
	in := false
	for k := 0; k < len(set); k++ {
		if k+2 < len(set) && set[k+1] == '-' {
			in = in || set[k] <= c && c <= set[k+2]
			k += 2
			continue
		}
		in = in || set[k] == c
	}
	if in != not {
		return end + 1
	}
	return 0
}
