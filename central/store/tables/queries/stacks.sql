-- name: GetBlob :one
SELECT * FROM blobs WHERE tenant = sqlc.arg(tenant) AND sha256 = sqlc.arg(sha256);

-- name: ListBlobs :many
SELECT * FROM blobs WHERE tenant = sqlc.arg(tenant) AND sha256 > sqlc.arg(after) ORDER BY sha256 LIMIT sqlc.arg(count);

-- name: SumBlobs :one
SELECT CAST(COALESCE(SUM(size), 0) AS BIGINT) AS bytes FROM blobs WHERE tenant = sqlc.arg(tenant);

-- name: InsertBlob :exec
INSERT INTO blobs (tenant, sha256, size, stored, actor)
VALUES (sqlc.arg(tenant), sqlc.arg(sha256), sqlc.arg(size), sqlc.arg(stored), sqlc.arg(actor));

-- name: DeleteBlob :exec
DELETE FROM blobs WHERE tenant = sqlc.arg(tenant) AND sha256 = sqlc.arg(sha256);

-- name: GetImageBySHA256 :one
SELECT * FROM images WHERE tenant = sqlc.arg(tenant) AND sha256 = sqlc.arg(sha256);

-- name: GetSystem :one
SELECT * FROM systems WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- name: ListSystems :many
SELECT * FROM systems WHERE tenant = sqlc.arg(tenant) AND node > sqlc.arg(after) ORDER BY node LIMIT sqlc.arg(count);

-- name: ListSystemsOfSite :many
SELECT * FROM systems WHERE tenant = sqlc.arg(tenant) AND site = sqlc.arg(site) ORDER BY node;

-- name: PutSystem :exec
INSERT INTO systems (tenant, node, site, body)
VALUES (sqlc.arg(tenant), sqlc.arg(node), sqlc.arg(site), sqlc.arg(body))
ON CONFLICT (tenant, node) DO UPDATE SET site = excluded.site, body = excluded.body;

-- name: DeleteSystem :exec
DELETE FROM systems WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- name: GetStack :one
SELECT * FROM stacks WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name);

-- name: ListStacks :many
SELECT * FROM stacks WHERE tenant = sqlc.arg(tenant) ORDER BY name;

-- name: InsertStack :exec
INSERT INTO stacks (tenant, name, revision, body)
VALUES (sqlc.arg(tenant), sqlc.arg(name), 1, sqlc.arg(body));

-- name: UpdateStack :execrows
UPDATE stacks SET revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);

-- name: DeleteStack :execrows
DELETE FROM stacks WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);

-- name: DeleteStackVersions :exec
DELETE FROM stack_versions WHERE tenant = sqlc.arg(tenant) AND stack = sqlc.arg(stack);

-- name: DeleteStackVersion :execrows
DELETE FROM stack_versions WHERE tenant = sqlc.arg(tenant) AND stack = sqlc.arg(stack) AND version = sqlc.arg(version);

-- name: GetStackVersion :one
SELECT * FROM stack_versions WHERE tenant = sqlc.arg(tenant) AND stack = sqlc.arg(stack) AND version = sqlc.arg(version);

-- name: GetStackVersionBySHA256 :one
SELECT * FROM stack_versions WHERE tenant = sqlc.arg(tenant) AND sha256 = sqlc.arg(sha256);

-- name: ListStackVersions :many
SELECT * FROM stack_versions WHERE tenant = sqlc.arg(tenant) AND stack = sqlc.arg(stack) ORDER BY published DESC, version;

-- name: InsertStackVersion :exec
INSERT INTO stack_versions (tenant, stack, version, sha256, published, actor, key_id, envelope)
VALUES (sqlc.arg(tenant), sqlc.arg(stack), sqlc.arg(version), sqlc.arg(sha256), sqlc.arg(published), sqlc.arg(actor), sqlc.arg(key_id), sqlc.arg(envelope));

-- name: DeleteSite :execrows
DELETE FROM sites WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);
