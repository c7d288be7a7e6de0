package server

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"sort"
	"strings"

	"github.com/muster-edge/muster/lab/standin/internal/conf"
)

// CriticalArgs are the settings that must be equal on all servers. A joining
// server compares them before it takes anything from the cluster.
type CriticalArgs struct {
	ClusterIPRanges       []string
	ServiceIPRanges       []string
	ClusterDNSs           []string
	ClusterDomain         string
	DisableCCM            bool
	DisableHelmController bool
	DisableNPC            bool
	DisableServiceLB      bool
	EncryptSecrets        bool
	EncryptProvider       string
	EmbeddedRegistry      bool
	FlannelBackend        string
	FlannelIPv6Masq       bool
	FlannelExternalIP     bool
	EgressSelectorMode    string
	SupervisorMetrics     bool
}

// Critical reads them from a configuration.
func Critical(c *conf.Config) CriticalArgs {
	return CriticalArgs{
		ClusterIPRanges: c.List("cluster-cidr"), ServiceIPRanges: c.List("service-cidr"), ClusterDNSs: c.List("cluster-dns"),
		ClusterDomain: c.Str("cluster-domain"), DisableCCM: c.Bool("disable-cloud-controller"),
		DisableHelmController: c.Bool("disable-helm-controller"), DisableNPC: c.Bool("disable-network-policy"),
		DisableServiceLB: slices.Contains(c.List("disable"), "servicelb"), EncryptSecrets: c.Bool("secrets-encryption"),
		EncryptProvider: c.Str("secrets-encryption-provider"), EmbeddedRegistry: c.Bool("embedded-registry"),
		FlannelBackend: c.Str("flannel-backend"), FlannelIPv6Masq: c.Bool("flannel-ipv6-masq"),
		FlannelExternalIP: c.Bool("flannel-external-ip"), EgressSelectorMode: c.Str("egress-selector-mode"),
		SupervisorMetrics: c.Bool("supervisor-metrics"),
	}
}

// compareCritical returns an error that names what differs.
func compareCritical(mine CriticalArgs, body []byte) error {
	var theirs CriticalArgs
	if err := json.Unmarshal(body, &theirs); err != nil {
		return err
	}
	var diff []string
	a, b := reflect.ValueOf(mine), reflect.ValueOf(theirs)
	for i := range a.NumField() {
		if !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			diff = append(diff, fmt.Sprintf("%s: %v != %v", a.Type().Field(i).Name, a.Field(i).Interface(), b.Field(i).Interface()))
		}
	}
	if len(diff) == 0 {
		return nil
	}
	sort.Strings(diff)
	return fmt.Errorf("critical configuration value mismatch between servers: %s", strings.Join(diff, "; "))
}
