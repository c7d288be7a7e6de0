package metal

import (
	"context"
	"fmt"

	"github.com/muster-edge/muster/agent/fetch"
	"github.com/muster-edge/muster/firmware"
	"github.com/muster-edge/muster/firmware/disk"
)

// WriteSlot brings root and hash tree of an image onto their partitions, going
// on behind the first from bytes of the two. Each chunk is verified, written,
// read back from the medium, and then noted.
func WriteSlot(ctx context.Context, f *fetch.Fetcher, img firmware.SlotImage, root, verity disk.Device, from int64, note func(verified int64) error) error {
	if root.Size() < img.Root.Size || verity.Size() < img.Verity.Size {
		return fmt.Errorf("metal: the slot has %d and %d bytes, the image needs %d and %d", root.Size(), verity.Size(), img.Root.Size, img.Verity.Size)
	}
	if from < img.Root.Size {
		b := fetch.Blob{Digest: img.Root.SHA256, Size: img.Root.Size, ChunkSize: img.ChunkSize}
		for _, c := range img.Chunks {
			b.Chunks = append(b.Chunks, c)
		}
		if err := f.Chunks(ctx, b, int(from/img.ChunkSize), func(_ int, off int64, chunk []byte) error {
			if err := disk.WriteChunk(root, off, chunk); err != nil {
				return err
			}
			return note(off + int64(len(chunk)))
		}); err != nil {
			return fmt.Errorf("metal: write root: %w", err)
		}
	}
	// The tree is a 128th of the root, so that it comes in one piece.
	tree := fetch.NewMemory()
	if err := f.Whole(ctx, fetch.Blob{Digest: img.Verity.SHA256, Size: img.Verity.Size}, tree); err != nil {
		return fmt.Errorf("metal: fetch the hash tree: %w", err)
	}
	for off, b := int64(0), tree.Bytes(); off < int64(len(b)); off += firmware.ChunkSize {
		if err := disk.WriteChunk(verity, off, b[off:min(off+firmware.ChunkSize, int64(len(b)))]); err != nil {
			return fmt.Errorf("metal: write the hash tree: %w", err)
		}
	}
	return note(img.Root.Size + img.Verity.Size)
}
