package main

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/security"
	"github.com/chromedp/chromedp"
)

// readmeCommands are the commands of a section of README.md, without comments.
func readmeCommands(t *testing.T, section string) []string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n## "+section+"\n")
	if !ok {
		t.Fatalf("README.md has no section %q", section)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	var out []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(block[1]) {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line != "" {
				out = append(out, line)
			}
		}
	}
	return out
}

// TestReadmeInTheBrowser does what the README says under "Approve a machine in
// the browser": a virtual machine from power-on, its approval in a real
// browser, and the machine under its site.
func TestReadmeInTheBrowser(t *testing.T) {
	if os.Getenv("MUSTER_VM_TESTS") == "" {
		t.Skip("starts a virtual machine: set MUSTER_VM_TESTS=1 to run it")
	}
	browser := ""
	for _, name := range []string{os.Getenv("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); name != "" && err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		t.Skip("no browser: install chromium (internal/dev/prerequisites test), or name one in $CHROMIUM")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "bin/muster-node")); err != nil {
		t.Skipf("%v: make build first", err)
	}
	commands := readmeCommands(t, "Approve a machine in the browser")
	if len(commands) != 5 || commands[0] != "bin/muster lab up" || commands[1] != "bin/muster lab console" || commands[4] != "bin/muster lab down" {
		t.Fatalf("the section's commands are %q: this test and the README go together", commands)
	}
	// The sockets below it have short names only.
	state, err := os.MkdirTemp("", "readme")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	command := func(ctx context.Context, line string) *exec.Cmd {
		f := strings.Fields(line)
		cmd := exec.CommandContext(ctx, filepath.Join(root, f[0]), f[1:]...)
		cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+state)
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
		return cmd
	}
	run := func(line string) string {
		t.Helper()
		cmd := command(ctx, line)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		return string(out)
	}

	run(commands[0])
	up := true
	t.Cleanup(func() {
		if up {
			_ = command(context.Background(), commands[4]).Run()
		}
	})
	// The port of the README may be taken on this host.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	_ = free.Close()
	consoleCtx, endConsole := context.WithCancel(ctx)
	defer endConsole()
	console := command(consoleCtx, commands[1]+" --listen "+at)
	said, err := console.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	console.Stderr = os.Stderr
	if err := console.Start(); err != nil {
		t.Fatal(err)
	}
	var origin, tokenFile string
	for lines := bufio.NewScanner(said); tokenFile == "" && lines.Scan(); {
		if _, rest, ok := strings.Cut(lines.Text(), ": https://"); ok {
			origin = "https://" + strings.TrimSuffix(rest, "/")
		}
		if _, rest, ok := strings.Cut(lines.Text(), "with the token in "); ok {
			tokenFile = rest
		}
	}
	if origin != "https://"+at || tokenFile == "" {
		t.Fatalf("the console says %q and %q", origin, tokenFile)
	}
	access, err := os.ReadFile(tokenFile)
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^token: (\S+)$`).FindSubmatch(access)
	if found == nil {
		t.Fatalf("%s holds no token", tokenFile)
	}

	alloc, endBrowser := chromedp.NewExecAllocator(ctx, append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(browser),
		chromedp.NoSandbox, chromedp.UserDataDir(filepath.Join(state, "profile")), chromedp.Flag("disable-dev-shm-usage", true), chromedp.WindowSize(1280, 900))...)
	defer endBrowser()
	page, closePage := chromedp.NewContext(alloc)
	defer closePage()
	step := func(what string, actions ...chromedp.Action) {
		t.Helper()
		// Long enough for a machine to boot without KVM on a busy host.
		bounded, cancel := context.WithTimeout(page, 4*time.Minute)
		defer cancel()
		if err := chromedp.Run(bounded, actions...); err != nil {
			var text string
			_ = chromedp.Run(page, chromedp.Text("body", &text, chromedp.ByQuery))
			t.Fatalf("%s: %v; the page says:\n%s", what, err, text)
		}
	}
	// The browser starts with the first run, and ends with its context.
	if err := chromedp.Run(page); err != nil {
		t.Fatal(err)
	}
	const row = "[data-row] [data-open]"
	var words string
	step("log in", security.SetIgnoreCertificateErrors(true), chromedp.Navigate(origin+"/"),
		chromedp.WaitVisible("#token", chromedp.ByQuery), chromedp.SendKeys("#token", string(found[1])+"\r", chromedp.ByQuery))
	// The queue is live: nobody presses reload.
	step("see the machine", chromedp.WaitVisible(row, chromedp.ByQuery), chromedp.Click(row, chromedp.ByQuery), chromedp.WaitVisible("#site", chromedp.ByQuery),
		chromedp.Text("body", &words, chromedp.ByQuery))
	if !strings.Contains(words, "measured") && !strings.Contains(words, "registered image") {
		t.Errorf("the page has no verdict on the boot:\n%s", words)
	}
	step("approve", chromedp.SendKeys("#site", "shop-1", chromedp.ByQuery), chromedp.Click("#create", chromedp.ByQuery),
		chromedp.Click(".decide .primary", chromedp.ByQuery), chromedp.WaitVisible("[data-done]", chromedp.ByQuery))

	site := run(commands[2])
	if !strings.Contains(site, "shop-1") || !regexp.MustCompile(`n-[a-z2-7]{24}|[a-z]+( [a-z]+){5}`).MatchString(site) {
		t.Errorf("the machine is not under its site:\n%s", site)
	}
	if events := run(commands[3]); !strings.Contains(events, "pxe.") || !strings.Contains(events, "approve") {
		t.Errorf("the events tell no story:\n%s", events)
	}
	endConsole()
	if err := console.Wait(); err != nil && ctx.Err() != nil {
		t.Error(err)
	}
	run(commands[4])
	up = false
}
