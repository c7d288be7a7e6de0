package image

import (
	"bytes"
	"debug/elf"
	_ "embed"
	"errors"
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"
)

//go:embed modules.txt
var modulesText string

// Kernel flavours: the names of Debian's kernel packages.
const (
	FlavourCloud   = "cloud"
	FlavourGeneric = "generic"
)

// moduleGroup is one entry of modules.txt.
type moduleGroup struct {
	name, reason string
	flavours     []string
	modules      []string
}

// parseModuleGroups reads the format that modules.txt explains.
func parseModuleGroups(text string) ([]moduleGroup, error) {
	var groups []moduleGroup
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[':
			head, reason, ok := strings.Cut(line[1:], "]")
			name, flavours, ok2 := strings.Cut(head, ":")
			g := moduleGroup{name: name, reason: strings.TrimSpace(reason), flavours: strings.Fields(flavours)}
			if !ok || !ok2 || len(g.flavours) == 0 || g.reason == "" {
				return nil, fmt.Errorf("image: module list, line %d: want [group: flavours] reason", n+1)
			}
			for _, f := range g.flavours {
				if f != FlavourCloud && f != FlavourGeneric {
					return nil, fmt.Errorf("image: module list, line %d: flavour %q is neither cloud nor generic", n+1, f)
				}
			}
			groups = append(groups, g)
		case len(groups) == 0:
			return nil, fmt.Errorf("image: module list, line %d: modules before the first group", n+1)
		default:
			g := &groups[len(groups)-1]
			g.modules = append(g.modules, strings.Fields(line)...)
		}
	}
	return groups, nil
}

// wanted lists the modules of the groups that name the flavour.
func wanted(groups []moduleGroup, flavour string) []string {
	var out []string
	for _, g := range groups {
		if slices.Contains(g.flavours, flavour) {
			out = append(out, g.modules...)
		}
	}
	return out
}

// moduleInfo is what a .ko says about itself in its .modinfo section.
type moduleInfo struct {
	// path below /lib/modules/<version>, e.g. kernel/drivers/nvme/host/nvme.ko.
	path    string
	depends []string // module names
	soft    []string // "pre:" soft dependencies: module names or aliases
	aliases []string
}

// moduleName is the name the kernel uses: the file's, with '-' as '_'.
func moduleName(p string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(p), ".ko"), "-", "_")
}

// parseModule reads the .modinfo section of a kernel module: NUL-separated
// key=value strings (include/linux/module.h, MODULE_INFO).
func parseModule(p string, ko []byte) (moduleInfo, error) {
	info := moduleInfo{path: p}
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return info, fmt.Errorf("image: read module %s: %w", p, err)
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return info, fmt.Errorf("image: read module %s: no .modinfo section", p)
	}
	data, err := sec.Data()
	if err != nil {
		return info, fmt.Errorf("image: read module %s: %w", p, err)
	}
	for _, kv := range strings.Split(string(data), "\x00") {
		key, value, _ := strings.Cut(kv, "=")
		switch key {
		case "depends":
			for _, d := range strings.Split(value, ",") {
				if d != "" {
					info.depends = append(info.depends, strings.ReplaceAll(d, "-", "_"))
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				switch {
				case strings.HasSuffix(word, ":"):
					pre = word == "pre:"
				case pre:
					info.soft = append(info.soft, strings.ReplaceAll(word, "-", "_"))
				}
			}
		case "alias":
			info.aliases = append(info.aliases, value)
		}
	}
	return info, nil
}

// modulePlan is the closure of the wanted modules and the tables for /init.
type modulePlan struct {
	// paths below /lib/modules/<version>, sorted.
	paths []string
	// dep and alias are the files modules.dep and modules.alias.
	dep, alias string
}

// planModules resolves dependencies. builtin is the kernel's modules.builtin.
//
// Soft "pre:" dependencies (r8169 needs realtek, file systems their checksum)
// become ordinary ones in the generated modules.dep: /init then needs no
// second table and no aliases to load a driver in the right order. A soft
// dependency that this kernel does not have is left out, as modprobe does.
func planModules(want []string, all []moduleInfo, builtin string) (modulePlan, error) {
	byName := map[string]*moduleInfo{}
	byAlias := map[string][]*moduleInfo{}
	for i := range all {
		m := &all[i]
		byName[moduleName(m.path)] = m
		for _, a := range m.aliases {
			a = strings.ReplaceAll(a, "-", "_")
			byAlias[a] = append(byAlias[a], m)
		}
	}
	built := map[string]bool{}
	for _, line := range strings.Fields(builtin) {
		built[moduleName(line)] = true
	}

	var problems []error
	// order[name] is everything name needs, in the order of loading.
	order := map[string][]*moduleInfo{}
	visiting := map[string]bool{}
	var resolve func(m *moduleInfo) []*moduleInfo
	resolve = func(m *moduleInfo) []*moduleInfo {
		name := moduleName(m.path)
		if got, done := order[name]; done {
			return got
		}
		if visiting[name] { // soft dependencies may form a ring; the first way round wins
			return nil
		}
		visiting[name] = true
		var needs []*moduleInfo
		add := func(d *moduleInfo) {
			for _, x := range append(resolve(d), d) {
				if x != m && !slices.Contains(needs, x) {
					needs = append(needs, x)
				}
			}
		}
		for _, s := range m.soft {
			if d := byName[s]; d != nil {
				add(d)
				continue
			}
			for _, d := range byAlias[s] {
				add(d)
			}
		}
		for _, d := range m.depends {
			if found := byName[d]; found != nil {
				add(found)
			} else if !built[d] {
				problems = append(problems, fmt.Errorf("%s needs %s, which is neither a .ko nor built in", name, d))
			}
		}
		order[name] = needs
		return needs
	}

	chosen := map[*moduleInfo]bool{}
	for _, w := range want {
		name := strings.ReplaceAll(w, "-", "_")
		m := byName[name]
		switch {
		case m != nil:
			chosen[m] = true
			for _, d := range resolve(m) {
				chosen[d] = true
			}
		case !built[name]:
			problems = append(problems, fmt.Errorf("%s is neither a .ko nor built into this kernel: correct modules.txt", w))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return modulePlan{}, fmt.Errorf("image: choose modules:\n%w", err)
	}

	var plan modulePlan
	for m := range chosen {
		plan.paths = append(plan.paths, m.path)
	}
	sort.Strings(plan.paths)
	var dep, alias strings.Builder
	alias.WriteString("# Aliases extracted from modules themselves.\n")
	for _, p := range plan.paths {
		m := byName[moduleName(p)]
		dep.WriteString(p + ":")
		// modules.dep lists what is loaded first last.
		needs := resolve(m)
		for i := len(needs) - 1; i >= 0; i-- {
			dep.WriteString(" " + needs[i].path)
		}
		dep.WriteString("\n")
		for _, a := range m.aliases {
			fmt.Fprintf(&alias, "alias %s %s\n", a, moduleName(p))
		}
	}
	plan.dep, plan.alias = dep.String(), alias.String()
	return plan, nil
}
