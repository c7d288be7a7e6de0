-- name: ListNodesOfSite :many
SELECT * FROM nodes WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) AND id > sqlc.arg(after) ORDER BY id LIMIT sqlc.arg(count);

-- name: NodeByKey :one
SELECT * FROM nodes WHERE tenant = sqlc.arg(tenant) AND ldevid_key = sqlc.arg(ldevid_key) LIMIT 1;

-- name: ListDocumentsOfSite :many
SELECT * FROM documents
WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) AND replaced = 0
  AND (epoch > sqlc.arg(epoch) OR (epoch = sqlc.arg(epoch) AND version > sqlc.arg(version)))
ORDER BY epoch, version LIMIT sqlc.arg(count);

-- name: ReplaceDocuments :exec
UPDATE documents SET replaced = 1
WHERE tenant = sqlc.arg(tenant) AND kind = sqlc.arg(kind) AND name = sqlc.arg(name) AND site = sqlc.arg(site) AND replaced = 0;

-- name: DocumentOfSite :one
SELECT * FROM documents
WHERE tenant = sqlc.arg(tenant) AND kind = sqlc.arg(kind) AND name = sqlc.arg(name) AND site = sqlc.arg(site)
ORDER BY epoch DESC, version DESC LIMIT 1;

-- name: GetAddress :one
SELECT address FROM addresses WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) AND node = sqlc.arg(node);

-- name: ListAddresses :many
SELECT node, address FROM addresses WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) ORDER BY address;

-- name: InsertAddress :exec
INSERT INTO addresses (tenant, site, node, address)
VALUES (sqlc.arg(tenant), sqlc.arg(site), sqlc.arg(node), sqlc.arg(address));

-- name: DeleteAddresses :exec
DELETE FROM addresses WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site);

-- name: GetReport :one
SELECT * FROM reports WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- name: ListReports :many
SELECT * FROM reports WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) ORDER BY node;

-- name: PutReport :exec
INSERT INTO reports (tenant, node, site, body)
VALUES (sqlc.arg(tenant), sqlc.arg(node), sqlc.arg(site), sqlc.arg(body))
ON CONFLICT (tenant, node) DO UPDATE SET site = excluded.site, body = excluded.body;

-- name: DeleteReport :exec
DELETE FROM reports WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- name: InsertOrder :exec
INSERT INTO orders (tenant, id, site, node, state, epoch, version, ends, revision, body, envelope)
VALUES (sqlc.arg(tenant), sqlc.arg(id), sqlc.arg(site), sqlc.arg(node), sqlc.arg(state), sqlc.arg(epoch), sqlc.arg(version), sqlc.arg(ends), 1, sqlc.arg(body), sqlc.arg(envelope));

-- The envelope never changes, nor what it says.
-- name: UpdateOrder :execrows
UPDATE orders SET state = sqlc.arg(state), revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id) AND revision = sqlc.arg(seen);

-- name: GetOrder :one
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: FindOrders :many
SELECT id FROM orders WHERE tenant = sqlc.arg(tenant) AND id >= sqlc.arg(low) AND id < sqlc.arg(high) ORDER BY id LIMIT sqlc.arg(count);

-- name: ListOrders :many
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) ORDER BY epoch DESC, version DESC LIMIT sqlc.arg(count);

-- name: ListOrdersOfSite :many
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) ORDER BY epoch DESC, version DESC LIMIT sqlc.arg(count);

-- name: ListOpenOrdersOfNode :many
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node) AND state IN ('open', 'delivered', 'running')
ORDER BY epoch, version LIMIT sqlc.arg(count);

-- name: ListOpenOrdersOfSite :many
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) AND state IN ('open', 'delivered', 'running')
ORDER BY epoch, version LIMIT sqlc.arg(count);

-- name: ListEndedOrders :many
SELECT * FROM orders WHERE tenant = sqlc.arg(tenant) AND state IN ('open', 'delivered') AND ends <= sqlc.arg(at)
ORDER BY ends LIMIT sqlc.arg(count);

-- name: InsertEscrow :exec
INSERT INTO escrow (tenant, id, site, node, size, stored, body)
VALUES (sqlc.arg(tenant), sqlc.arg(id), sqlc.arg(site), sqlc.arg(node), sqlc.arg(size), sqlc.arg(stored), sqlc.arg(body));

-- name: GetEscrow :one
SELECT * FROM escrow WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: ListEscrow :many
SELECT * FROM escrow WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) ORDER BY stored DESC, id LIMIT sqlc.arg(count);

-- name: ListEscrowOfTenant :many
SELECT * FROM escrow WHERE tenant = sqlc.arg(tenant) AND id > sqlc.arg(after) ORDER BY id LIMIT sqlc.arg(count);

-- name: DeleteEscrow :exec
DELETE FROM escrow WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);
