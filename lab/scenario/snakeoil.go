package scenario

import (
	"context"
	"fmt"
	"os"
	"os/exec"

	"github.com/muster-edge/muster/lab"
	"github.com/muster-edge/muster/lab/machine"
)

// snakeoilKey writes Debian's published Secure Boot test key without its
// password, as sbsign wants it, into the run's directory.
func snakeoilKey(ctx context.Context, l *lab.Lab) (string, error) {
	out := l.Path("secure-boot.key")
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		return "", &lab.Unable{Reason: "the Secure Boot test key is encrypted and openssl is missing", Packages: []string{"openssl"}}
	}
	if f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil {
		return "", fmt.Errorf("scenario: decrypt Secure Boot key: %w", err)
	} else if err := f.Close(); err != nil {
		return "", fmt.Errorf("scenario: decrypt Secure Boot key: %w", err)
	}
	cmd := exec.CommandContext(ctx, "openssl", "rsa", "-in", machine.SnakeoilKey, "-passin", "pass:"+machine.SnakeoilPassword, "-out", out)
	if b, err := cmd.CombinedOutput(); err != nil {
		_ = os.Remove(out)
		return "", fmt.Errorf("scenario: decrypt Secure Boot key: %w: %s", err, b)
	}
	return out, nil
}
