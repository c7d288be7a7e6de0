package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/muster-edge/muster/fleet"
)

// applySystem changes what was given of how nodes are installed and updated.
func (s *siteFlags) applySystem(given func(string) bool, set *fleet.SiteSettings) error {
	var errs []error
	if given("install") {
		rule, err := parseDiskRule(s.install)
		errs = append(errs, err)
		set.Install = rule
	}
	if !slices.ContainsFunc([]string{"update-window", "update-paused", "drain-timeout", "drain-force", "rate-kbit"}, given) {
		return errors.Join(errs...)
	}
	u := fleet.DefaultUpdate()
	if set.Update != nil {
		u = *set.Update
	}
	if given("update-window") {
		u.Windows = nil
		for _, w := range s.windows {
			if w == "always" {
				continue
			}
			window, err := parseWindow(w)
			errs = append(errs, err)
			u.Windows = append(u.Windows, window)
		}
	}
	if given("update-paused") {
		u.Paused = s.paused
	}
	if given("drain-timeout") {
		u.DrainTimeout = int64(s.drainTimeout / time.Second)
	}
	if given("drain-force") {
		u.DrainForce = s.drainForce
	}
	if given("rate-kbit") {
		u.RateKbit = s.rateKbit
	}
	set.Update = &u
	return errors.Join(errs...)
}

// parseDiskRule reads "nvme-first,model=PM9*,min=100000000000"; "none" is nil.
func parseDiskRule(s string) (*fleet.DiskRule, error) {
	if s == "none" {
		return nil, nil
	}
	words := strings.Split(s, ",")
	r := &fleet.DiskRule{Prefer: words[0]}
	var errs []error
	number := func(v string) int64 {
		n, err := strconv.ParseInt(v, 10, 64)
		errs = append(errs, err)
		return n
	}
	for _, w := range words[1:] {
		switch key, value, _ := strings.Cut(w, "="); key {
		case "model":
			r.Model = value
		case "transport":
			r.Transport = value
		case "min":
			r.MinBytes = number(value)
		case "max":
			r.MaxBytes = number(value)
		case "overwrite":
			r.Overwrite = true
		default:
			errs = append(errs, fmt.Errorf("%q is none of model=, transport=, min=, max=, overwrite", w))
		}
	}
	if err := errors.Join(append(errs, r.Validate())...); err != nil {
		return nil, fmt.Errorf("--install: %w", err)
	}
	return r, nil
}

// parseWindow reads "[mon,tue ]HH:MM MINUTES [UTC+OFFSET_MINUTES]".
func parseWindow(s string) (w fleet.UpdateWindow, err error) {
	words := strings.Fields(s)
	if len(words) > 0 && !strings.Contains(words[0], ":") {
		w.Days, words = strings.Split(words[0], ","), words[1:]
	}
	wrong := fmt.Errorf("--update-window %q: want \"[mon,tue ]HH:MM MINUTES [UTC+OFFSET_MINUTES]\", such as \"sat,sun 02:00 180 UTC+60\"", s)
	if len(words) < 2 || len(words) > 3 {
		return w, wrong
	}
	w.From = words[0]
	if w.Minutes, err = strconv.ParseInt(words[1], 10, 64); err != nil {
		return w, wrong
	}
	if len(words) == 3 {
		offset, found := strings.CutPrefix(words[2], "UTC")
		if w.UTCOffset, err = strconv.ParseInt(offset, 10, 64); err != nil || !found {
			return w, wrong
		}
	}
	if err := (fleet.UpdatePolicy{Windows: []fleet.UpdateWindow{w}}).Validate(); err != nil {
		return w, fmt.Errorf("--update-window %q: %w", s, err)
	}
	return w, nil
}
