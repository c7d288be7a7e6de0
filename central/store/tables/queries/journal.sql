-- name: LastEvent :one
SELECT CAST(COALESCE(MAX(seq), 0) AS BIGINT) AS seq FROM events WHERE tenant = sqlc.arg(tenant);

-- name: InsertEvent :exec
INSERT INTO events (tenant, seq, body) VALUES (sqlc.arg(tenant), sqlc.arg(seq), sqlc.arg(body));

-- name: TrimEvents :exec
DELETE FROM events WHERE tenant = sqlc.arg(tenant) AND seq <= sqlc.arg(seq);

-- name: ListEvents :many
SELECT * FROM events WHERE tenant = sqlc.arg(tenant) AND seq > sqlc.arg(after) ORDER BY seq LIMIT sqlc.arg(count);

-- name: LastAudit :one
SELECT * FROM audit WHERE tenant = sqlc.arg(tenant) ORDER BY seq DESC LIMIT 1;

-- name: InsertAudit :exec
INSERT INTO audit (tenant, seq, hash, body) VALUES (sqlc.arg(tenant), sqlc.arg(seq), sqlc.arg(hash), sqlc.arg(body));

-- name: ListAudit :many
SELECT * FROM audit WHERE tenant = sqlc.arg(tenant) AND seq > sqlc.arg(after) ORDER BY seq LIMIT sqlc.arg(count);
