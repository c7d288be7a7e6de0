-- Pre-approvals that approve: single use and caps are lines that the database
-- holds, too.
-- +goose Up
ALTER TABLE preapprovals ADD COLUMN kind TEXT NOT NULL DEFAULT '';
ALTER TABLE preapprovals ADD COLUMN claim TEXT NOT NULL DEFAULT '';
ALTER TABLE preapprovals ADD COLUMN withdrawn BIGINT NOT NULL DEFAULT 0;
CREATE UNIQUE INDEX preapprovals_by_claim ON preapprovals (tenant, claim) WHERE claim <> '';
CREATE INDEX preapprovals_by_kind ON preapprovals (tenant, kind, withdrawn, name);

-- A line of a list is a row of its own: lists are long, and using one line
-- must not rewrite the others. request is '' until the line was used.
DROP TABLE listed_eks;
CREATE TABLE listed_eks (
    tenant      TEXT NOT NULL,
    ek          TEXT NOT NULL,
    preapproval TEXT NOT NULL,
    request     TEXT NOT NULL,
    body        TEXT NOT NULL,
    PRIMARY KEY (tenant, ek, preapproval),
    FOREIGN KEY (tenant, preapproval) REFERENCES preapprovals (tenant, name)
);

-- One row per use. A machine uses a pre-approval once, and a request is
-- approved by one.
CREATE TABLE preapproval_uses (
    tenant      TEXT   NOT NULL,
    preapproval TEXT   NOT NULL,
    node        TEXT   NOT NULL,
    request     TEXT   NOT NULL,
    at          BIGINT NOT NULL,
    PRIMARY KEY (tenant, preapproval, node),
    FOREIGN KEY (tenant, preapproval) REFERENCES preapprovals (tenant, name),
    FOREIGN KEY (tenant, request) REFERENCES requests (tenant, id)
);
CREATE UNIQUE INDEX preapproval_uses_by_request ON preapproval_uses (tenant, request);
CREATE INDEX preapproval_uses_by_node ON preapproval_uses (tenant, node);
CREATE INDEX preapproval_uses_by_time ON preapproval_uses (tenant, preapproval, at);

-- +goose Down
DROP TABLE preapproval_uses;
DROP TABLE listed_eks;
CREATE TABLE listed_eks (
    tenant      TEXT NOT NULL,
    ek          TEXT NOT NULL,
    preapproval TEXT NOT NULL,
    PRIMARY KEY (tenant, ek, preapproval),
    FOREIGN KEY (tenant, preapproval) REFERENCES preapprovals (tenant, name)
);
DROP INDEX preapprovals_by_kind;
DROP INDEX preapprovals_by_claim;
ALTER TABLE preapprovals DROP COLUMN withdrawn;
ALTER TABLE preapprovals DROP COLUMN claim;
ALTER TABLE preapprovals DROP COLUMN kind;
