package install

import (
	"context"
	"fmt"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
)

// WriteSlot brings root and hash tree of a slot image onto their partitions,
// going on behind the first from bytes (firmware.SlotUpdate.Verified). Each
// chunk is verified before it is written, read back from the medium, and then
// noted; when it returns nil, all is there.
func WriteSlot(ctx context.Context, f *fetch.Fetcher, img firmware.SlotImage, root, verity disk.Device, from int64, note func(verified int64) error) error {
	if root.Size() < img.Root.Size || verity.Size() < img.Verity.Size {
		return fmt.Errorf("install: the slot has %d and %d bytes, the image needs %d and %d", root.Size(), verity.Size(), img.Root.Size, img.Verity.Size)
	}
	if from < img.Root.Size {
		chunks := make([]fetch.Digest, len(img.Chunks))
		for i, c := range img.Chunks {
			chunks[i] = c
		}
		b := fetch.Blob{Digest: img.Root.SHA256, Size: img.Root.Size, ChunkSize: img.ChunkSize, Chunks: chunks}
		err := f.Chunks(ctx, b, int(from/img.ChunkSize), func(_ int, off int64, chunk []byte) error {
			if err := disk.WriteChunk(root, off, chunk); err != nil {
				return err
			}
			return note(off + int64(len(chunk)))
		})
		if err != nil {
			return fmt.Errorf("install: write root: %w", err)
		}
	}
	// The tree is small beside the root (a 128th), so that it comes at once.
	mem := fetch.NewMemory()
	if err := f.Whole(ctx, fetch.Blob{Digest: img.Verity.SHA256, Size: img.Verity.Size}, mem); err != nil {
		return fmt.Errorf("install: fetch hash tree: %w", err)
	}
	tree := mem.Bytes()
	for off := 0; off < len(tree); off += firmware.ChunkSize {
		if err := disk.WriteChunk(verity, int64(off), tree[off:min(off+firmware.ChunkSize, len(tree))]); err != nil {
			return fmt.Errorf("install: write hash tree: %w", err)
		}
	}
	return note(img.WriteSize())
}
