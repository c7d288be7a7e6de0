-- name: GetRollout :one
SELECT * FROM rollouts WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name);

-- name: ListRollouts :many
SELECT * FROM rollouts WHERE tenant = sqlc.arg(tenant) ORDER BY name;

-- name: ListRolloutsOfState :many
SELECT * FROM rollouts WHERE state = sqlc.arg(state) ORDER BY tenant, name;

-- name: InsertRollout :exec
INSERT INTO rollouts (tenant, name, state, revision, body)
VALUES (sqlc.arg(tenant), sqlc.arg(name), sqlc.arg(state), 1, sqlc.arg(body));

-- name: UpdateRollout :execrows
UPDATE rollouts SET state = sqlc.arg(state), revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);

-- name: DeleteRollout :execrows
DELETE FROM rollouts WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);
