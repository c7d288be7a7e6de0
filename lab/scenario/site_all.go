package scenario

import (
	"context"
	"time"

	"github.com/muster-edge/muster/lab"
)

// siteScenarios are those of the host lab.
func siteScenarios() []lab.Scenario {
	make := func(name, summary string, nodes int, o shopOptions, steps func(context.Context, *shop) error) lab.Scenario {
		return lab.Scenario{
			Name: name, Summary: summary, Host: true, Nodes: nodes, Timeout: 20 * time.Minute,
			Prepare: prepareShop, Run: shopScenario(o, steps),
		}
	}
	return []lab.Scenario{
		make("ha", "five boxes plugged in one after the other become a site that survives the loss of any of them", 5, shopOptions{}, ha),
	}
}
