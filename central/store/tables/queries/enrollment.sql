-- name: GetRequest :one
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: ListRequestsOfNode :many
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node) ORDER BY first_seen, id;

-- name: ListRequests :many
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant)
ORDER BY first_seen DESC, id LIMIT sqlc.arg(count);

-- name: ListRequestsByState :many
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant) AND state = sqlc.arg(state)
ORDER BY first_seen, id LIMIT sqlc.arg(count);

-- Each half goes by its index: with OR, SQLite reads every request of the
-- tenant.
-- name: ListLookAlikes :many
SELECT * FROM requests
WHERE requests.tenant = sqlc.arg(tenant) AND requests.node <> sqlc.arg(node)
  AND requests.id IN (
    SELECT s.id FROM requests s WHERE s.tenant = sqlc.arg(tenant) AND s.serial = sqlc.arg(serial) AND s.serial <> ''
    UNION ALL SELECT u.id FROM requests u WHERE u.tenant = sqlc.arg(tenant) AND u.uuid = sqlc.arg(uuid) AND u.uuid <> '')
  AND requests.state IN ('pending', 'approved', 'issued', 'quarantined', 'rejected')
ORDER BY requests.id LIMIT sqlc.arg(count);

-- name: ListRequestsBefore :many
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant) AND first_seen <= sqlc.arg(first_seen)
  AND (first_seen < sqlc.arg(first_seen) OR id > sqlc.arg(id))
ORDER BY first_seen DESC, id LIMIT sqlc.arg(count);

-- name: ListRequestsByStateAfter :many
SELECT * FROM requests WHERE tenant = sqlc.arg(tenant) AND state = sqlc.arg(state) AND first_seen >= sqlc.arg(first_seen)
  AND (first_seen > sqlc.arg(first_seen) OR id > sqlc.arg(id))
ORDER BY first_seen, id LIMIT sqlc.arg(count);

-- name: CountUnverified :one
SELECT COUNT(*) AS n FROM requests
WHERE tenant = sqlc.arg(tenant) AND state IN ('pending', 'quarantined') AND identity = 'unverified';

-- name: CountRequests :many
SELECT state, COUNT(*) AS n FROM requests WHERE tenant = sqlc.arg(tenant) GROUP BY state;

-- name: InsertRequest :exec
INSERT INTO requests (tenant, id, node, words, state, identity, serial, uuid, digest, first_seen, revision, body)
VALUES (sqlc.arg(tenant), sqlc.arg(id), sqlc.arg(node), sqlc.arg(words), sqlc.arg(state), sqlc.arg(identity), sqlc.arg(serial), sqlc.arg(uuid), sqlc.arg(digest), sqlc.arg(first_seen), sqlc.arg(revision), sqlc.arg(body));

-- The node and the evidence of a request never change.
-- name: UpdateRequest :execrows
UPDATE requests SET state = sqlc.arg(state), revision = sqlc.arg(revision), body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id) AND node = sqlc.arg(node) AND digest = sqlc.arg(digest)
  AND revision = sqlc.arg(seen);

-- name: LatestIssued :one
SELECT * FROM issued WHERE tenant = sqlc.arg(tenant) AND request = sqlc.arg(request)
ORDER BY not_after DESC, serial LIMIT 1;

-- name: ListIssuedOfNode :many
SELECT * FROM issued WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node) ORDER BY not_after, serial;

-- name: InsertIssued :exec
INSERT INTO issued (tenant, serial, request, node, ldevid_key, not_before, not_after, body)
VALUES (sqlc.arg(tenant), sqlc.arg(serial), sqlc.arg(request), sqlc.arg(node), sqlc.arg(ldevid_key), sqlc.arg(not_before), sqlc.arg(not_after), sqlc.arg(body));

-- name: GetDenial :one
SELECT * FROM denials WHERE tenant = sqlc.arg(tenant) AND ek = sqlc.arg(ek);

-- name: ListDenials :many
SELECT * FROM denials WHERE tenant = sqlc.arg(tenant) ORDER BY ek;

-- name: PutDenial :exec
INSERT INTO denials (tenant, ek, node, reason, actor, at)
VALUES (sqlc.arg(tenant), sqlc.arg(ek), sqlc.arg(node), sqlc.arg(reason), sqlc.arg(actor), sqlc.arg(at))
ON CONFLICT (tenant, ek) DO UPDATE SET node = excluded.node, reason = excluded.reason, actor = excluded.actor, at = excluded.at;

-- name: DeleteDenials :execrows
DELETE FROM denials WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- name: ListCookieKeys :many
SELECT * FROM cookie_keys ORDER BY id DESC;

-- name: InsertCookieKey :exec
INSERT INTO cookie_keys (id, created, sealed) VALUES (sqlc.arg(id), sqlc.arg(created), sqlc.arg(sealed));

-- name: DeleteCookieKeysBefore :exec
DELETE FROM cookie_keys WHERE id < sqlc.arg(id);
