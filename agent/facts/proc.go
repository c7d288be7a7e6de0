package facts

import (
	"strconv"
	"strings"
)

// cpuInfo returns the first model name and the number of processors of
// /proc/cpuinfo. arm64 has no model name there: then the name is empty.
func cpuInfo(b []byte) (model string, cpus int) {
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		switch strings.TrimSpace(k) {
		case "processor":
			cpus++
		case "model name":
			if model == "" {
				model = strings.Join(strings.Fields(clean([]byte(v))), " ")
			}
		}
	}
	return model, cpus
}

// memTotal returns MemTotal of /proc/meminfo in bytes, 0 if it is not there.
func memTotal(b []byte) int64 {
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(line, "MemTotal:")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 10, 64)
		if err != nil || n < 0 || n > 1<<50 {
			return 0
		}
		return n << 10
	}
	return 0
}
