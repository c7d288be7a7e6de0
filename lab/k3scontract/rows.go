// Package k3scontract is what muster relies on k3s for, one row per behaviour,
// and the black-box tests of those rows: configuration in; files, HTTP, the API
// and the process's end out. The same tests run against a real k3s and against
// the stand-in; docs/k3s-contract.md says which row passed on what. A row that
// passes on the stand-in alone proves nothing about k3s.
package k3scontract

// Row is one behaviour.
type Row struct {
	ID     string
	What   string // the behaviour, checkable from outside
	Relies string // what breaks in muster when it changes
	// ByHand is what was measured by hand on a real k3s (v1.36.3 era, built
	// from source), "" if nothing was.
	ByHand string
	// Only is "stand-in" for rows about the stand-in itself.
	Only string
}

// Rows is the contract, in the order of the document.
var Rows = []Row{
	{ID: "C1", What: "An agent whose configuration holds a server-only key ends with a status other than 0.", Relies: "cluster-bootstrap/k3s: files by role"},
	{ID: "C2", What: "A server skips keys that it does not know.", Relies: "cluster-bootstrap/k3s: newer and older k3s beside one another"},
	{ID: "C3", What: "Of the drop-ins a later file replaces a key and `key+` appends; drop-ins alone are enough.", Relies: "cluster-bootstrap/k3s: role file, volatile cluster-init"},
	{ID: "C4", What: "`--version` prints `k3s version vX`.", Relies: "cluster-bootstrap/k3s: version check; lab/k3sbin"},
	{ID: "F1", What: "After founding: server/token (0600, K10), node-token link, cred/passwd with both passwords, CA keys 0600, db/etcd 0700 with name `<node>-<8 hex>`, kubeconfig 0600.", Relies: "cluster-bootstrap/k3s: Observe, token files, escrow"},
	{ID: "F2", What: "After founding the WAL directory exists.", Relies: "cluster-bootstrap: signs of membership on the disk"},
	{ID: "F3", What: "The node password (0600, 32 hex digits) is outside of the data directory and is kept.", Relies: "cluster-bootstrap/k3s: node password kept over role changes"},
	{ID: "T1", What: "The hash of the K10 token is the SHA-256 of what /cacerts serves (one certificate).", Relies: "cluster-bootstrap/k3s: WorkerToken in K10 form"},
	{ID: "T2", What: "An agent with a wrong pin registers nothing and keeps trying.", Relies: "peers: nobody in between gets a token"},
	{ID: "T3", What: "A bootstrap token with a life of minutes joins an agent.", Relies: "cluster-bootstrap: join material of minutes", ByHand: "passed"},
	{ID: "T4", What: "A deleted bootstrap token joins nobody; the agent keeps trying.", Relies: "cluster-bootstrap: join material ends"},
	{ID: "T5", What: "A bootstrap token never makes a server.", Relies: "cluster-bootstrap: workers hold no server token"},
	{ID: "T6", What: "server-bootstrap gives the CA keys for the server token, and nothing for the agent token.", Relies: "cluster-bootstrap: workers hold no server token"},
	{ID: "T7", What: "A worker restarts without a valid token: its certificate is enough.", Relies: "cluster-bootstrap: bootstrap tokens of minutes"},
	{ID: "H1", What: "/ping and /cacerts answer anybody.", Relies: "cluster-bootstrap/k3s: probes, pin"},
	{ID: "H2", What: "/db/info answers the loopback without credentials and refuses others.", Relies: "cluster-bootstrap/k3s: Observe"},
	{ID: "H3", What: "/readyz needs credentials; with them it is `ok`.", Relies: "cluster-bootstrap/k3s: Observe"},
	{ID: "H4", What: "Without etcd the API answers 503, /db/info 500, /ping still pong.", Relies: "cluster-bootstrap/k3s: quorum lost is seen", ByHand: "passed (/db/info 500)"},
	{ID: "H5", What: "READY=1 comes only once the API answers.", Relies: "cluster-bootstrap/k3s: launcher forwards readiness"},
	{ID: "N1", What: "A server's Node carries the roles control-plane and etcd, the member's name and address, and EtcdIsVoter=True.", Relies: "cluster-bootstrap/k3s: Observe, RemoveServer"},
	{ID: "N2", What: "Node labels of the configuration are applied again at each start.", Relies: "hardware facts as node labels"},
	{ID: "N3", What: "Another machine with the name of a node and another node password is refused (403) and keeps trying; the node stays.", Relies: "cluster-bootstrap/k3s: node password kept"},
	{ID: "N4", What: "After the Node is deleted, a new password is accepted for its name.", Relies: "re-imaged boxes"},
	{ID: "N5", What: "A node whose agent is dead turns from Ready to Unknown.", Relies: "cluster-bootstrap: who is ready"},
	{ID: "S1", What: "SIGTERM ends an agent with status 0 and leaves pods running; the next start finds them.", Relies: "cluster-bootstrap/k3s: role change without an interruption", ByHand: "passed (pods not looked at)"},
	{ID: "S2", What: "A founder started again, still with cluster-init, is the same member of the same cluster.", Relies: "cluster-bootstrap: power cut after founding"},
	{ID: "S3", What: "cluster-init on an emptied data directory makes a NEW cluster.", Relies: "cluster-bootstrap: founding right, volatile cluster-init"},
	{ID: "S4", What: "A second k3s on a node: the server cannot listen on 6444, ends with status 0 and stays a voter that is never there.", Relies: "cluster-bootstrap/k3s: launcher's lock", ByHand: "passed"},
	{ID: "S5", What: "The process list shows no argument of a running k3s.", Relies: "no secrets in argv; old process found by PID, never by arguments", ByHand: "passed"},
	{ID: "J1", What: "Two workers become servers in place, together, with max-learners=2: three voters, Nodes and passwords kept.", Relies: "cluster-bootstrap: promotion", ByHand: "passed (29 s, no failed API probe)"},
	{ID: "J2", What: "With max-learners left alone the second joiner waits until the first is a voter; three voters in the end.", Relies: "cluster-bootstrap: serial promotion", ByHand: "passed"},
	{ID: "J3", What: "A server with another value of a critical argument does not join.", Relies: "cluster-bootstrap/k3s: critical-argument check"},
	{ID: "J4", What: "A learner is shown as one in /db/info, and its server is not ready before it is a voter.", Relies: "cluster-bootstrap: steps of a promotion", ByHand: "passed"},
	{ID: "J5", What: "With one voter of three dead a new server is kept waiting; after the dead one's Node is deleted it becomes a voter.", Relies: "cluster-bootstrap: replacement of a dead server"},
	{ID: "R1", What: "Deleting the Node of a server removes its member.", Relies: "cluster-bootstrap/k3s: RemoveServer"},
	{ID: "R2", What: "The annotation etcd.k3s.cattle.io/remove removes the member, keeps the Node and sets removed-node-name; the removed server leaves a tombstone.", Relies: "cluster-bootstrap/k3s: RemoveServer"},
	{ID: "R3", What: "A tombstone with `server:` set: the next start backs the database up and joins again by itself.", Relies: "cluster-bootstrap: role changes before any restart"},
	{ID: "R4", What: "A tombstone without `server:`: k3s does not start.", Relies: "cluster-bootstrap/k3s: state after a removal"},
	{ID: "R5", What: "The only voter is not removed by annotation; the annotation goes.", Relies: "cluster-bootstrap/k3s: RemoveServer"},
	{ID: "S6", What: "A server that was a member restarts with a join address that answers nothing.", Relies: "cluster-bootstrap: cold start in any order"},
	{ID: "B1", What: "Agents live on, and start again, when the server of their configured address is dead: the kept list of servers is enough.", Relies: "cluster-bootstrap: dead founder"},
	{ID: "B2", What: "The kubernetes Endpoints and the agent's list name all servers on 6443.", Relies: "cluster-bootstrap/k3s: Observe"},
	{ID: "L1", What: "One voter of three killed: the API of the others stays.", Relies: "cluster-bootstrap: three servers", ByHand: "passed"},
	{ID: "L2", What: "A learner that has just died may still be made a voter: then the API is gone and stays gone.", Relies: "cluster-bootstrap: the fenced window of a promotion", ByHand: "passed (2 of 3 tries)"},
	{ID: "X1", What: "cluster-reset after a lost quorum: ends with status 0, one voter, nothing lost; the next normal start works.", Relies: "cluster-bootstrap/k3s: Reset", ByHand: "passed (8 s, API back after 15 s)"},
	{ID: "X2", What: "A second reset in a row is refused; a normal start allows it again.", Relies: "cluster-bootstrap/k3s: Reset"},
	{ID: "X3", What: "cluster-reset with `server:` set is an error.", Relies: "cluster-bootstrap/k3s: Reset"},
	{ID: "X4", What: "After a reset a survivor of the old cluster joins as an agent under its old name, with server/ moved aside.", Relies: "cluster-bootstrap: the others come back as workers", ByHand: "passed"},
	{ID: "X5", What: "Restore of a snapshot brings its data back, drops what came later and keeps the old database beside it.", Relies: "cluster-bootstrap/k3s: Restore"},
	{ID: "X6", What: "Restore with another token is refused.", Relies: "escrow: snapshot and token together"},
	{ID: "X7", What: "Restore works on an empty data directory with the token alone: same authorities, same cluster.", Relies: "cluster-bootstrap: last server lost"},
	{ID: "X8", What: "max-learners=2 still lets two learners in at once after a reset and after a restore.", Relies: "cluster-bootstrap: promotion after a recovery"},
	{ID: "P1", What: "etcd-snapshot save writes a file of mode 0600, ls lists it, delete removes it.", Relies: "cluster-bootstrap/k3s: Snapshot"},
	{ID: "P2", What: "/db/snapshot is refused without the server token.", Relies: "cluster-bootstrap/k3s: Snapshot"},
	{ID: "M1", What: "The stand-in says what it is in version, answers and Nodes, and starts only with LAB_STANDIN=1.", Relies: "no report takes it for k3s", Only: "stand-in"},
}
