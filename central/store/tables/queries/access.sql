-- name: GetCredentialByHash :one
SELECT * FROM credentials WHERE hash = sqlc.arg(hash);

-- name: GetCredential :one
SELECT * FROM credentials WHERE id = sqlc.arg(id);

-- name: ListCredentials :many
SELECT * FROM credentials WHERE kind = sqlc.arg(kind) AND id > sqlc.arg(after) ORDER BY id LIMIT sqlc.arg(count);

-- name: ListCredentialsOfTenant :many
SELECT * FROM credentials WHERE tenant = sqlc.arg(tenant) AND kind = sqlc.arg(kind) AND id > sqlc.arg(after) ORDER BY id LIMIT sqlc.arg(count);

-- name: ListCredentialsOfHolder :many
SELECT * FROM credentials WHERE holder = sqlc.arg(holder) AND kind = sqlc.arg(kind) ORDER BY id LIMIT sqlc.arg(count);

-- name: InsertCredential :exec
INSERT INTO credentials (id, hash, tenant, kind, holder, created, expires, idle, last_used, revoked, body)
VALUES (sqlc.arg(id), sqlc.arg(hash), sqlc.arg(tenant), sqlc.arg(kind), sqlc.arg(holder), sqlc.arg(created), sqlc.arg(expires), sqlc.arg(idle), sqlc.arg(last_used), 0, sqlc.arg(body));

-- name: UseCredential :exec
UPDATE credentials SET last_used = sqlc.arg(at) WHERE id = sqlc.arg(id) AND last_used < sqlc.arg(at);

-- name: RevokeCredential :execrows
UPDATE credentials SET revoked = sqlc.arg(at) WHERE id = sqlc.arg(id) AND revoked = 0;

-- name: DropCredentials :exec
DELETE FROM credentials WHERE kind = sqlc.arg(kind)
    AND (expires > 0 AND expires < sqlc.arg(before) OR revoked > 0 AND revoked < sqlc.arg(before));

-- name: ListBindingsOfSubject :many
SELECT * FROM bindings WHERE subject = sqlc.arg(subject) ORDER BY tenant, id;

-- name: ListBindings :many
SELECT * FROM bindings WHERE tenant = sqlc.arg(tenant) ORDER BY subject, id;

-- name: GetBinding :one
SELECT * FROM bindings WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: InsertBinding :exec
INSERT INTO bindings (tenant, id, subject, created, body)
VALUES (sqlc.arg(tenant), sqlc.arg(id), sqlc.arg(subject), sqlc.arg(created), sqlc.arg(body));

-- name: DeleteBinding :execrows
DELETE FROM bindings WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: InsertLoginState :exec
INSERT INTO login_states (hash, expires, body) VALUES (sqlc.arg(hash), sqlc.arg(expires), sqlc.arg(body));

-- name: GetLoginState :one
SELECT * FROM login_states WHERE hash = sqlc.arg(hash);

-- name: DeleteLoginState :execrows
DELETE FROM login_states WHERE hash = sqlc.arg(hash);

-- name: DropLoginStates :exec
DELETE FROM login_states WHERE expires <= sqlc.arg(at);
