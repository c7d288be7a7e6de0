package mdns

import "sync/atomic"

// Counters are sums since New, but Links, which is how many sockets are open.
type Counters struct {
	// Received counts packets read from sockets. Of these were left aside:
	// Noise, which is not about our service; Oversize, longer than RFC 6762
	// §17 allows; OffLink, from a source that is not on the link (§11);
	// Hops, responses that did not come with TTL 255; Malformed; QueueFull,
	// when the program could not keep up.
	Received, Noise, Oversize, OffLink, Hops, Malformed, QueueFull uint64
	// KernelDrops is what the kernel dropped before we could read it.
	KernelDrops uint64
	// Hints were handed on; OtherSite were adverts of other sites;
	// HintsDropped fell out of a queue that nobody emptied.
	Hints, OtherSite, HintsDropped uint64
	// Queries, Announcements, Replies and Goodbyes were sent. Suppressed
	// replies were known to the asker (§7.1), or too many to answer singly.
	Queries, Announcements, Replies, Suppressed, Goodbyes uint64
	// SendErrors and OpenErrors: see the log for the causes.
	SendErrors, OpenErrors uint64
	Links                  int64
}

type counters struct {
	received, noise, oversize, offLink, hops, malformed, queueFull atomic.Uint64
	kernelDrops                                                    atomic.Uint64
	hints, otherSite                                               atomic.Uint64
	queries, announcements, replies, suppressed, goodbyes          atomic.Uint64
	sendErrors, openErrors                                         atomic.Uint64
	links                                                          atomic.Int64
}

// Counters may be called at any time.
func (s *Service) Counters() Counters {
	c := &s.c
	return Counters{
		Received: c.received.Load(), Noise: c.noise.Load(), Oversize: c.oversize.Load(), OffLink: c.offLink.Load(),
		Hops: c.hops.Load(), Malformed: c.malformed.Load(), QueueFull: c.queueFull.Load(), KernelDrops: c.kernelDrops.Load(),
		Hints: c.hints.Load(), OtherSite: c.otherSite.Load(), HintsDropped: s.hints.dropped.Load(),
		Queries: c.queries.Load(), Announcements: c.announcements.Load(), Replies: c.replies.Load(),
		Suppressed: c.suppressed.Load(), Goodbyes: c.goodbyes.Load(),
		SendErrors: c.sendErrors.Load(), OpenErrors: c.openErrors.Load(), Links: c.links.Load(),
	}
}
