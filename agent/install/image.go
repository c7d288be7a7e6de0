package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/fleet"
)

// fetchRecovery finds the manifest of the recovery image. What a centre surely
// does not have is no reason to leave a machine without a system; what does not
// answer is asked again.
func (i *Installer) fetchRecovery(ctx context.Context) error {
	images, why := i.cfg.Recovery()
	if len(images) == 0 {
		i.noRecovery(why)
		return nil
	}
	errs := []error{errors.New("the recovery image did not come")}
	missing := true
	for _, s := range i.cfg.Sources() {
		for _, ref := range images {
			m, err := i.openRecovery(ctx, s, ref)
			if err == nil {
				i.recovery = &m
				return nil
			}
			missing = missing && errors.Is(err, fetch.ErrMissing)
			errs = append(errs, fmt.Errorf("%s: %w", s.Name(), err))
		}
	}
	if len(errs) > 1 && missing {
		i.noRecovery(images[0].ID() + " is not at the centre as a file: `muster image push` brings it there")
		return nil
	}
	return errors.Join(errs...)
}

// openRecovery asks s for the manifest of ref, and for the first byte of the
// image. An image for other machines is as good as missing.
func (i *Installer) openRecovery(ctx context.Context, s Source, ref fleet.ImageRef) (firmware.Manifest, error) {
	b, err := s.Manifest(ctx, fetch.Digest(ref.SHA256), fleet.MaxManifest)
	if err != nil {
		return firmware.Manifest{}, err
	}
	m, err := firmware.OpenManifest(b, i.cfg.ReleaseKeys)
	switch {
	case err != nil:
		return m, err
	case !bytes.Equal(m.SHA256[:], ref.SHA256) || m.Name != ref.Name || m.Version != ref.Version:
		return m, errors.New("it is the manifest of another image")
	case m.Kind != fleet.ImageRecovery || m.Size > firmware.SizeESP/4:
		return m, fmt.Errorf("an image of kind %s with %d bytes", m.Kind, m.Size)
	case m.Arch != i.cfg.Arch:
		return m, fmt.Errorf("it is for %s: %w", m.Arch, fetch.ErrMissing)
	}
	r, err := s.Open(ctx, fetch.Digest(m.SHA256), 0, 1)
	if err != nil {
		return m, err
	}
	return m, r.Close()
}

func (i *Installer) noRecovery(why string) {
	i.recoveryWhy = why
	i.log.Warn("the disk gets no recovery image", "why", why)
}
