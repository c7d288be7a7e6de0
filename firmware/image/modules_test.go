package image

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestModuleList(t *testing.T) {
	groups, err := parseModuleGroups(modulesText)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for _, g := range groups {
		for _, m := range g.modules {
			if seen[m] != "" {
				t.Errorf("%s is in %s and %s", m, seen[m], g.name)
			}
			seen[m] = g.name
		}
	}
	generic, cloud := wanted(groups, FlavourGeneric), wanted(groups, FlavourCloud)
	for _, m := range cloud {
		if !slices.Contains(generic, m) {
			t.Errorf("%s is in the cloud list only: the generic image must boot wherever the cloud one does", m)
		}
	}
	// The machine lab cannot do without these.
	for _, m := range []string{"virtio_net", "virtio_blk", "virtio_pci", "efivarfs", "tpm_tis", "tpm_crb"} {
		if !slices.Contains(cloud, m) {
			t.Errorf("%s is missing for the cloud kernel", m)
		}
	}
	for when, text := range map[string]string{
		"a module has no group":    "virtio_net",
		"a group has no flavour":   "[a] reason",
		"a flavour is unknown":     "[a: arm] reason",
		"a group has no reason":    "[a: cloud]",
		"a group head is not done": "[a: cloud reason",
	} {
		if _, err := parseModuleGroups(text); err == nil {
			t.Errorf("when %s, then no error", when)
		}
	}
}

func TestParseModule(t *testing.T) {
	got, err := parseModule("kernel/net/x-y.ko", elfModule("license=GPL", "alias=pci:v1*", "alias=x", "depends=a,b-c",
		"softdep=pre: p q-r post: z", "name=x_y", "broken"))
	if err != nil {
		t.Fatal(err)
	}
	want := moduleInfo{path: "kernel/net/x-y.ko", depends: []string{"a", "b_c"}, soft: []string{"p", "q_r"}, aliases: []string{"pci:v1*", "x"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(moduleInfo{})); diff != "" {
		t.Error(diff)
	}
	if got := moduleName(got.path); got != "x_y" {
		t.Errorf("its name is %s", got)
	}
	if _, err := parseModule("x.ko", []byte("no ELF")); err == nil {
		t.Error("a text was read as a module")
	}
}

func FuzzParseModule(f *testing.F) {
	f.Add(elfModule("alias=a", "depends=b", "softdep=pre: c"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, ko []byte) {
		_, _ = parseModule("kernel/x.ko", ko)
	})
}

func TestPlanModules(t *testing.T) {
	all := []moduleInfo{
		{path: "kernel/r8169.ko", depends: []string{"libphy"}, soft: []string{"realtek"}, aliases: []string{"pci:v000010ECd00008168*"}},
		{path: "kernel/realtek.ko", depends: []string{"libphy"}},
		{path: "kernel/libphy.ko", depends: []string{"mdio"}},
		{path: "kernel/mdio.ko"},
		{path: "kernel/libcrc.ko", soft: []string{"crc32c", "absent"}},
		{path: "kernel/crc-one.ko", aliases: []string{"crc32c"}},
		{path: "kernel/crc-two.ko", aliases: []string{"crc32c"}},
		{path: "kernel/ring-a.ko", soft: []string{"ring_b"}},
		{path: "kernel/ring-b.ko", soft: []string{"ring_a"}},
		{path: "kernel/broken.ko", depends: []string{"nowhere"}},
		{path: "kernel/fine.ko", depends: []string{"inside"}},
		{path: "kernel/unused.ko", aliases: []string{"pci:unused"}},
	}
	builtin := "kernel/tpm/tpm-tis.ko\nkernel/inside.ko\n"

	plan, err := planModules([]string{"r8169", "libcrc", "tpm_tis", "ring-a", "fine"}, all, builtin)
	if err != nil {
		t.Fatal(err)
	}
	wantPaths := []string{"kernel/crc-one.ko", "kernel/crc-two.ko", "kernel/fine.ko", "kernel/libcrc.ko", "kernel/libphy.ko", "kernel/mdio.ko",
		"kernel/r8169.ko", "kernel/realtek.ko", "kernel/ring-a.ko", "kernel/ring-b.ko"}
	if diff := cmp.Diff(wantPaths, plan.paths); diff != "" {
		t.Error(diff)
	}
	// Loaded from the right: mdio, libphy, realtek, r8169.
	if want := "kernel/r8169.ko: kernel/realtek.ko kernel/libphy.ko kernel/mdio.ko\n"; !strings.Contains(plan.dep, want) {
		t.Errorf("modules.dep lacks %q:\n%s", want, plan.dep)
	}
	if !strings.Contains(plan.dep, "kernel/mdio.ko:\n") || strings.Contains(plan.alias, "unused") {
		t.Errorf("modules.dep:\n%smodules.alias:\n%s", plan.dep, plan.alias)
	}
	if want := "alias pci:v000010ECd00008168* r8169\n"; !strings.Contains(plan.alias, want) {
		t.Errorf("modules.alias lacks %q:\n%s", want, plan.alias)
	}
	checkOrder(t, plan)

	_, err = planModules([]string{"broken", "missing", "r8169"}, all, builtin)
	if err == nil || !strings.Contains(err.Error(), "nowhere") || !strings.Contains(err.Error(), "missing") {
		t.Errorf("want both problems named, got %v", err)
	}
}

// checkOrder wants everything a line names to have a line and a file of its
// own, and hard dependencies to be complete.
func checkOrder(t *testing.T, plan modulePlan) {
	t.Helper()
	lines := map[string]bool{}
	for _, line := range strings.Split(strings.TrimSpace(plan.dep), "\n") {
		name, _, _ := strings.Cut(line, ":")
		lines[name] = true
	}
	for _, line := range strings.Split(strings.TrimSpace(plan.dep), "\n") {
		name, deps, _ := strings.Cut(line, ":")
		for _, d := range strings.Fields(deps) {
			if !lines[d] || !slices.Contains(plan.paths, d) || d == name {
				t.Errorf("%s needs %s, which the image lacks", name, d)
			}
		}
	}
}
