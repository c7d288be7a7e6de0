package sim

import (
	"flag"
	"fmt"
	"os"
	"sort"
	"testing"
	"time"
)

var (
	seedsFlag = flag.Int("seeds", 0, "number of seeds")
	seedFlag  = flag.Int("seed", -1, "one seed")
	kindFlag  = flag.String("kind", "", "kind")
)

func TestSmoke(t *testing.T) {
	if *seedFlag >= 0 {
		r := Run(uint64(*seedFlag), Options{Kind: *kindFlag, Trace: os.Stdout})
		fmt.Println(r.Violation, r.End, r.Events)
		return
	}
	moves := map[string]int{}
	ends := map[string]int{}
	t0 := time.Now()
	ev := 0
	for seed := uint64(0); seed < uint64(*seedsFlag); seed++ {
		r := Run(seed, Options{Kind: *kindFlag})
		ev += r.Events
		for m, c := range r.Moves {
			moves[fmt.Sprintf("%s -> %s", m[0], m[1])] += c
		}
		if r.Violation != "" {
			fmt.Printf("%d VIOLATION %s\n", seed, r.Violation)
		}
		ends[r.End]++
	}
	fmt.Println(ends, time.Since(t0), ev)
	var ks []string
	for k := range moves {
		ks = append(ks, k)
	}
	sort.Strings(ks)
	for _, k := range ks {
		fmt.Println(k, moves[k])
	}
}
