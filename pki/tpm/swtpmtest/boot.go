package swtpmtest

import (
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// Extend extends a PCR of the SHA-256 bank, as firmware does before any
// operating system runs.
func (t *TPM) Extend(pcr int, digest [32]byte) error {
	return t.do("extend PCR", func(c transport.TPM) error {
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{
				{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]},
			}},
		}.Execute(c)
		return err
	})
}

// Clear makes the TPM forget its owner (TPM2_Clear), as somebody at the
// firmware's set-up does: every key of the owner hierarchy is another one
// afterwards, the EK stays.
func (t *TPM) Clear() error {
	return t.do("clear TPM", func(c transport.TPM) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(c)
		return err
	})
}

// do makes one use of the TPM: swtpm serves one connection at a time.
func (t *TPM) do(what string, f func(transport.TPM) error) error {
	c, err := linuxudstpm.Open(t.Path())
	if err != nil {
		return fmt.Errorf("swtpmtest: %s: %w", what, err)
	}
	err = f(c)
	if cerr := c.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("swtpmtest: %s: %w", what, err)
	}
	return nil
}
