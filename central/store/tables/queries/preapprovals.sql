-- name: GetPreApproval :one
SELECT * FROM preapprovals WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name);

-- name: GetPreApprovalByClaim :one
SELECT * FROM preapprovals WHERE tenant = sqlc.arg(tenant) AND claim = sqlc.arg(claim) AND claim <> '';

-- name: ListPreApprovals :many
SELECT * FROM preapprovals WHERE tenant = sqlc.arg(tenant) ORDER BY name;

-- name: ListPreApprovalsOfKind :many
SELECT * FROM preapprovals WHERE tenant = sqlc.arg(tenant) AND kind = sqlc.arg(kind) AND withdrawn = 0 ORDER BY name;

-- name: InsertPreApproval :exec
INSERT INTO preapprovals (tenant, name, kind, claim, withdrawn, revision, body)
VALUES (sqlc.arg(tenant), sqlc.arg(name), sqlc.arg(kind), sqlc.arg(claim), sqlc.arg(withdrawn), 1, sqlc.arg(body));

-- What is withdrawn stays so.
-- name: UpdatePreApproval :execrows
UPDATE preapprovals SET withdrawn = CASE WHEN withdrawn = 1 THEN 1 ELSE CAST(sqlc.arg(withdrawn) AS BIGINT) END,
    revision = revision + 1, body = sqlc.arg(body)
WHERE tenant = sqlc.arg(tenant) AND name = sqlc.arg(name) AND kind = sqlc.arg(kind) AND claim = sqlc.arg(claim)
  AND revision = sqlc.arg(seen);

-- name: InsertListedEK :exec
INSERT INTO listed_eks (tenant, ek, preapproval, request, body)
VALUES (sqlc.arg(tenant), sqlc.arg(ek), sqlc.arg(preapproval), sqlc.arg(request), sqlc.arg(body));

-- name: ListLinesOfEK :many
SELECT l.* FROM listed_eks l JOIN preapprovals p ON p.tenant = l.tenant AND p.name = l.preapproval
WHERE l.tenant = sqlc.arg(tenant) AND l.ek = sqlc.arg(ek) AND p.withdrawn = 0
ORDER BY l.preapproval;

-- A line is used once.
-- name: UseListedEK :execrows
UPDATE listed_eks SET request = sqlc.arg(request)
WHERE tenant = sqlc.arg(tenant) AND ek = sqlc.arg(ek) AND preapproval = sqlc.arg(preapproval) AND request = '';

-- name: InsertPreApprovalUse :exec
INSERT INTO preapproval_uses (tenant, preapproval, node, request, at)
VALUES (sqlc.arg(tenant), sqlc.arg(preapproval), sqlc.arg(node), sqlc.arg(request), sqlc.arg(at));

-- name: CountPreApprovalUses :one
SELECT COUNT(*) AS n FROM preapproval_uses
WHERE tenant = sqlc.arg(tenant) AND preapproval = sqlc.arg(preapproval) AND at > sqlc.arg(after);

-- name: CountPreApprovalUsesOfNode :one
SELECT COUNT(*) AS n FROM preapproval_uses WHERE tenant = sqlc.arg(tenant) AND node = sqlc.arg(node);

-- Quotes inside of texts are escaped in the body, so that the pattern fits the
-- field alone; names of sites hold no wildcards.
-- name: CountLinesOfSite :one
SELECT COUNT(*) FROM listed_eks
WHERE tenant = sqlc.arg(tenant) AND preapproval = sqlc.arg(preapproval) AND body LIKE CAST(sqlc.arg(pattern) AS TEXT);
