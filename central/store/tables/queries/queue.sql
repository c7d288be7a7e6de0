-- name: ListQueue :many
SELECT * FROM requests
WHERE tenant = sqlc.arg(tenant) AND state = sqlc.arg(state) AND identity = sqlc.arg(identity)
  AND first_seen >= sqlc.arg(first_seen) AND (first_seen > sqlc.arg(first_seen) OR id > sqlc.arg(id))
ORDER BY first_seen, id LIMIT sqlc.arg(count);

-- name: CountQueue :many
SELECT identity, COUNT(*) AS n FROM requests
WHERE tenant = sqlc.arg(tenant) AND state = sqlc.arg(state) GROUP BY identity;
