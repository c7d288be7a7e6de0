-- name: InsertChanges :exec
INSERT INTO changes (seq, token, body)
VALUES (sqlc.arg(seq), sqlc.arg(token), sqlc.arg(body));

-- name: CountChangesByToken :one
SELECT COUNT(*) AS n FROM changes WHERE token = sqlc.arg(token);

-- name: ListChanges :many
SELECT * FROM changes WHERE seq > sqlc.arg(after) ORDER BY seq LIMIT sqlc.arg(count);

-- name: ChangesRange :one
SELECT CAST(COALESCE(MIN(seq), 0) AS BIGINT) AS oldest, CAST(COALESCE(MAX(seq), 0) AS BIGINT) AS newest FROM changes;

-- name: TrimChanges :exec
DELETE FROM changes WHERE seq <= sqlc.arg(seq);
