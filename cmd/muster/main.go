// Command muster is the operator's tool and the central and boot services in
// one binary. Each verb lives in its own file; main only lists them.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the Makefile.
var version = "0.0.0-dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx))
}

// run is main with an exit code: 0 held, 1 failed, 2 usage, 3 cannot run here.
func run(ctx context.Context) int {
	err := rootCommand().ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(os.Stderr, "muster: %v\n", err)
	var code exitError
	if errors.As(err, &code) {
		return code.code
	}
	return 1
}

// rootCommand is the whole tree of verbs.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "muster",
		Short:         "Turns boxes of PCs into Kubernetes sites that nobody on site has to understand",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(
		imageCommand(),
		releaseCommand(),
		labCommand(),
		serveCommand(),
		getCommand(),
		describeCommand(),
		approveCommand(),
		rejectCommand(),
		denyCommand(),
		replaceCommand(),
		allowCommand(),
		assignCommand(),
		removeCommand(),
		siteCommand(),
		stackCommand(),
		applyCommand(),
		exportCommand(),
		schemaCommand(),
		deleteCommand(),
		watchCommand(),
		rolloutCommand(),
		labelCommand(),
		orderCommand(),
		escrowCommand(),
		preapproveCommand(),
		scanCommand(),
		eventsCommand(),
		auditCommand(),
		loginCommand(),
		logoutCommand(),
		whoamiCommand(),
		tokenCommand(),
		rolesCommand(),
		tenantCommand(),
		rootsCommand(),
		caCommand(),
		restoredCommand(), backupCommand(), restoreCommand(), databaseCommand(),
		bootCommand(),
		configCommand(),
		supportCommand(),
		manCommand(),
	)
	root.SetFlagErrorFunc(onFlagError)
	root.SuggestionsMinimumDistance = 2
	strict(root)
	return root
}

// exitError carries an exit code other than 1.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string { return e.err.Error() }
func (e exitError) Unwrap() error { return e.err }
