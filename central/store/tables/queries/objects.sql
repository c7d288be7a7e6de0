-- name: GetSetting :one
SELECT value FROM settings WHERE name = sqlc.arg(name);

-- name: PutSetting :exec
INSERT INTO settings (name, value) VALUES (sqlc.arg(name), sqlc.arg(value))
ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: GetTenant :one
SELECT * FROM tenants WHERE name = sqlc.arg(name);

-- name: ListTenants :many
SELECT * FROM tenants ORDER BY name;

-- name: InsertTenant :exec
INSERT INTO tenants (name, lab, revision, body)
VALUES (sqlc.arg(name), sqlc.arg(lab), 1, sqlc.arg(body));

-- A tenant that was a lab once stays one: no statement sets lab back to 0.
-- name: UpdateTenant :execrows
UPDATE tenants SET lab = CASE WHEN lab = 1 THEN 1 ELSE CAST(sqlc.arg(lab) AS BIGINT) END,
    revision = revision + 1, body = sqlc.arg(body)
WHERE name = sqlc.arg(name) AND revision = sqlc.arg(seen);

-- name: GetSite :one
SELECT * FROM sites WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name);

-- name: ListSites :many
SELECT * FROM sites WHERE tenant = sqlc.arg(tenant) AND name > sqlc.arg(after) ORDER BY name LIMIT sqlc.arg(count);

-- name: InsertSite :exec
INSERT INTO sites (tenant, name, revision, body)
VALUES (sqlc.arg(tenant), sqlc.arg(name), 1, sqlc.arg(body));

-- name: UpdateSite :execrows
UPDATE sites SET revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND revision = sqlc.arg(seen);

-- name: GetNode :one
SELECT * FROM nodes WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id);

-- name: ListNodes :many
SELECT * FROM nodes WHERE tenant = sqlc.arg(tenant) AND id > sqlc.arg(after) ORDER BY id LIMIT sqlc.arg(count);

-- name: InsertNode :exec
INSERT INTO nodes (tenant, id, words, state, site, ek, ldevid_key, revision, last_seen, body)
VALUES (sqlc.arg(tenant), sqlc.arg(id), sqlc.arg(words), sqlc.arg(state), sqlc.arg(site), sqlc.arg(ek), sqlc.arg(ldevid_key), 1, sqlc.arg(last_seen), sqlc.arg(body));

-- name: UpdateNode :execrows
UPDATE nodes SET state = sqlc.arg(state), site = sqlc.arg(site), ldevid_key = sqlc.arg(ldevid_key),
    revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id) AND ek = sqlc.arg(ek) AND revision = sqlc.arg(seen);

-- name: TouchNode :exec
UPDATE nodes SET last_seen = sqlc.arg(at)
WHERE tenant = sqlc.arg(tenant) AND id = sqlc.arg(id) AND last_seen < sqlc.arg(at);

-- name: GetImage :one
SELECT * FROM images
WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND version = sqlc.arg(version) AND arch = sqlc.arg(arch);

-- name: ListImages :many
SELECT * FROM images WHERE tenant = sqlc.arg(tenant) ORDER BY name, version, arch;

-- name: InsertImage :exec
INSERT INTO images (tenant, name, version, arch, sha256, body)
VALUES (sqlc.arg(tenant), sqlc.arg(name), sqlc.arg(version), sqlc.arg(arch), sqlc.arg(sha256), sqlc.arg(body));

-- name: ListReleaseKeys :many
SELECT * FROM release_keys WHERE tenant = sqlc.arg(tenant) ORDER BY keyid;

-- name: InsertReleaseKey :execrows
INSERT INTO release_keys (tenant, keyid, pem, added)
VALUES (sqlc.arg(tenant), sqlc.arg(keyid), sqlc.arg(pem), sqlc.arg(added))
ON CONFLICT (tenant, keyid) DO NOTHING;

-- name: LatestDocument :one
SELECT * FROM documents
WHERE tenant = sqlc.arg(tenant) AND kind = sqlc.arg(kind) AND name = sqlc.arg(name)
ORDER BY epoch DESC, version DESC LIMIT 1;

-- name: InsertDocument :exec
INSERT INTO documents (tenant, kind, name, epoch, version, at, envelope, site, replaced)
VALUES (sqlc.arg(tenant), sqlc.arg(kind), sqlc.arg(name), sqlc.arg(epoch), sqlc.arg(version), sqlc.arg(at), sqlc.arg(envelope), sqlc.arg(site), 0);

-- IDs and words are lower case; high is the first text after all that start
-- with the wanted prefix.
-- name: FindNodes :many
SELECT nodes.id FROM nodes WHERE nodes.tenant = sqlc.arg(tenant) AND nodes.id IN (
    SELECT i.id FROM nodes i WHERE i.tenant = sqlc.arg(tenant) AND i.id >= sqlc.arg(low) AND i.id < sqlc.arg(high)
    UNION ALL SELECT w.id FROM nodes w WHERE w.tenant = sqlc.arg(tenant) AND w.words >= sqlc.arg(low) AND w.words < sqlc.arg(high))
ORDER BY nodes.id LIMIT sqlc.arg(count);

-- name: FindRequests :many
SELECT requests.id FROM requests WHERE requests.tenant = sqlc.arg(tenant) AND requests.id IN (
    SELECT i.id FROM requests i WHERE i.tenant = sqlc.arg(tenant) AND i.id >= sqlc.arg(low) AND i.id < sqlc.arg(high)
    UNION ALL SELECT n.id FROM requests n WHERE n.tenant = sqlc.arg(tenant) AND n.node >= sqlc.arg(low) AND n.node < sqlc.arg(high)
    UNION ALL SELECT w.id FROM requests w WHERE w.tenant = sqlc.arg(tenant) AND w.words >= sqlc.arg(low) AND w.words < sqlc.arg(high))
ORDER BY CASE requests.state WHEN 'superseded' THEN 1 WHEN 'expired' THEN 1 ELSE 0 END, requests.id LIMIT sqlc.arg(count);

-- name: CountNodes :many
SELECT state, COUNT(*) AS n FROM nodes WHERE tenant = sqlc.arg(tenant) GROUP BY state;
