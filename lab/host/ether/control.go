package ether

import (
	"fmt"
	"time"
)

// SetPort sets what befalls frames on a port's cable, in both directions. The
// port need not be attached yet.
func (s *Switch) SetPort(name string, f Faults) error {
	if err := f.Validate(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(name)
	if err != nil {
		return err
	}
	p.in.Faults, p.out.Faults = f, f
	return nil
}

// find returns a port, made without a station if it is not there. The lock is
// held.
func (s *Switch) find(name string) (*port, error) {
	p := s.ports[name]
	if p == nil {
		if len(s.ports) >= maxPorts {
			return nil, fmt.Errorf("ether: set up %s: there are %d ports", name, maxPorts)
		}
		p = &port{name: name, in: newWay(s.cfg.Seed, name+" in"), out: newWay(s.cfg.Seed, name+" out")}
		s.ports[name] = p
	}
	return p, nil
}

// SetWay sets what befalls frames from one port to another. The way back is
// another one: setting only one of them makes a link that works one way.
func (s *Switch) SetWay(from, to string, f Faults) error {
	if err := f.Validate(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ways) >= maxPorts*maxPorts {
		return fmt.Errorf("ether: set way %s > %s: there are too many", from, to)
	}
	s.way(from, to).Faults = f
	return nil
}

// SetAll sets the same faults on the ways between all pairs of the ports, in
// both directions.
func (s *Switch) SetAll(ports []string, f Faults) error {
	for _, a := range ports {
		for _, b := range ports {
			if a != b {
				if err := s.SetWay(a, b, f); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Partition splits the ports into sides that do not hear each other. Ports
// that are not named hear everybody. Each call replaces the split before;
// without arguments all are together again.
func (s *Switch) Partition(sides ...[]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.sides)
	for i, side := range sides {
		for _, name := range side {
			s.sides[name] = i + 1
		}
	}
}

// Dark makes a port pass nothing for a time, or until Light if d is 0. Frames
// that are under way to it are lost.
func (s *Switch) Dark(name string, d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.find(name)
	if err != nil {
		return err
	}
	p.dark, p.until = true, time.Time{}
	if d > 0 {
		p.until = time.Now().Add(d)
	}
	return nil
}

// Light ends Dark.
func (s *Switch) Light(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.ports[name]; p != nil {
		p.dark = false
	}
}

// Heal makes every cable and way good again and ends splits and dark ports.
func (s *Switch) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.sides)
	for _, w := range s.ways {
		w.Faults = Faults{}
	}
	for _, p := range s.ports {
		p.in.Faults, p.out.Faults, p.dark = Faults{}, Faults{}, false
	}
}

// Counters returns the counters of every port so far.
func (s *Switch) Counters() map[string]Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]Counters, len(s.ports))
	for name, p := range s.ports {
		out[name] = p.count
	}
	return out
}
