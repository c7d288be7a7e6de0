package scenario

import (
	"context"
	"time"

	"github.com/muster-edge/muster/fleet"
	"github.com/muster-edge/muster/lab"
)

// siteScenarios are those of the host lab.
func siteScenarios() []lab.Scenario {
	of := func(name, summary string, nodes int, o shopOptions, steps func(context.Context, *shop) error) lab.Scenario {
		return lab.Scenario{
			Name: name, Summary: summary, Host: true, Nodes: nodes, Timeout: 20 * time.Minute,
			Prepare: prepareShop, Run: shopScenario(o, steps),
		}
	}
	first := shopOptions{founding: fleet.FoundFirst}
	return []lab.Scenario{
		of("ha", "five boxes plugged in one after the other become a site that survives the loss of any of them", 5, shopOptions{}, ha),
		of("race", "all boxes get power at once on a bad LAN and agree by themselves who founds (founding mode first)", 4, first, race),
		of("late", "boxes that come late become workers; one that nobody approved gets nothing until somebody does", 5, shopOptions{}, late),
		of("partition", "the LAN falls apart: the smaller part founds and promotes nothing", 5, shopOptions{}, partition),
		of("powercut", "the power of founder, candidate or both is cut at a line of their work (--step, --who, --never)", 3, shopOptions{}, powercut),
		of("replace", "a server that never comes back is replaced; when it does, it is a worker", 4, shopOptions{policy: []string{"--replace-after", "60s"}}, replace),
		of("coldstart", "the whole site loses its power and comes back in any order, without the centre", 4, shopOptions{}, coldstart),
		of("readdress", "one box, then all get other addresses", 4, shopOptions{}, readdress),
		of("rogue", "a box that nobody approved, and an approved one with somebody else's system, get nothing", 5, shopOptions{}, rogue),
		of("nocentre", "the centre goes away as soon as the boxes hold their papers", 4, shopOptions{}, nocentre),
		of("meet-virgin", "two clusters with nothing in them meet: one remains", 4, first, meetVirgin),
		of("meet-used", "two clusters with data meet: one is fenced and a person is asked", 4, first, meetUsed),
		of("lastserver", "the only server is lost for good: a person orders another node to go on from a sealed snapshot", 3,
			shopOptions{policy: []string{"--servers", "1"}}, lastServer),
		{
			Name: "by-hand", Summary: "for comparison: the same nodes and k3s, a script instead of muster, until three voters", Host: true,
			Nodes: 3, Timeout: 15 * time.Minute, Prepare: prepareShop, Run: byHand,
		},
	}
}
