package scenario

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ha: boxes are plugged in one after the other. They end as three servers and
// workers, and then lose any one of them without losing the API.
func ha(ctx context.Context, s *shop) error {
	began := time.Now()
	apart := 3 * time.Second
	if s.l.Spec.Together {
		apart = 0
	}
	if err := s.staggered(ctx, apart, s.nodes...); err != nil {
		return err
	}
	if err := s.form(ctx, began, len(s.nodes)); err != nil {
		return err
	}
	if err := s.atRest(ctx, 3, len(s.nodes)); err != nil {
		return err
	}
	if err := s.checkStatus(); err != nil {
		return err
	}
	if err := s.idle(ctx); err != nil {
		return err
	}
	v := s.watch.now()
	servers := v.with(s, roleServer)
	if err := s.l.Check("something is written into the cluster", s.mark(ctx, servers[1], "before-the-loss")); err != nil {
		return err
	}
	// The twin of "three servers": without one of them it goes on.
	lost := servers[0]
	if err := s.cut(lost); err != nil {
		return err
	}
	_, err := s.watch.until(ctx, "API after a loss", healLimit, func(v view) bool {
		return v.best.API && v.best.From != lost && v.role(lost) == ""
	})
	if err = errors.Join(err, s.hasMark(ctx, servers[1], "before-the-loss")); s.l.Check("with the first server gone the API goes on and nothing is lost", err) != nil {
		return err
	}
	if err := s.on(ctx, lost); err != nil {
		return err
	}
	return s.atRest(ctx, 3, len(s.nodes))
}

// checkStatus looks at what every node says of itself.
func (s *shop) checkStatus() error {
	v := s.watch.now()
	var errs []error
	uid, err := s.uid(v)
	errs = append(errs, err)
	for _, b := range s.nodes {
		st, ok := v.status[b.Name()]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("%s says nothing", b.Name()))
		case st.Node != string(b.ID()):
			errs = append(errs, fmt.Errorf("%s says it is %s, its TPM makes it %s", b.Name(), st.Node, b.ID()))
		case st.Site != site || st.ClusterUID != uid:
			errs = append(errs, fmt.Errorf("%s says site %q, cluster %q; want %q, %q", b.Name(), st.Site, st.ClusterUID, site, uid))
		case st.Blocker != "":
			errs = append(errs, fmt.Errorf("%s names the blocker %s: %s", b.Name(), st.Blocker, st.Reason))
		}
	}
	return s.l.Check("every node says who it is, of which cluster, and that nothing blocks it", errors.Join(errs...))
}
