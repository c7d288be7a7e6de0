// Package fetch brings a large file over thin and broken lines: from several
// sources, any of which may be away, slow or lying. A file is known by its
// digest and by those of its chunks, so that nothing is believed because of
// where it came from: a bad chunk is thrown away and marks who sent it.
//
// A chunk that was handed on is never fetched again; whoever takes it notes
// that on disk, so that a power cut costs at most one chunk. A broken
// connection costs nothing: the rest of the chunk is asked for.
//
// Picker is the pure part: whom to ask next, and when. It knows no network and
// no clock.
package fetch
