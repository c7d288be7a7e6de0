package install

import "sync"

// box holds what several goroutines look at.
type box struct {
	mu  sync.Mutex
	now Now
}

func (b *box) get() Now {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

// set reports whether something changed.
func (b *box) set(change func(*Now)) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := b.now
	change(&b.now)
	return b.now != before
}
