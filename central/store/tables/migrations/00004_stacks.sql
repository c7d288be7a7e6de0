-- Systems: which blobs count, what nodes run, and what sites shall run.
-- +goose Up
-- The bytes are files: the database knows which of them count.
CREATE TABLE blobs (
    tenant TEXT   NOT NULL,
    sha256 TEXT   NOT NULL,
    size   BIGINT NOT NULL,
    stored BIGINT NOT NULL,
    actor  TEXT   NOT NULL,
    PRIMARY KEY (tenant, sha256)
);

CREATE TABLE systems (
    tenant TEXT NOT NULL,
    node   TEXT NOT NULL,
    site   TEXT NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (tenant, node),
    FOREIGN KEY (tenant, node) REFERENCES nodes (tenant, id)
);
CREATE INDEX systems_by_site ON systems (tenant, site, node);

CREATE TABLE stacks (
    tenant   TEXT   NOT NULL,
    name     TEXT   NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- What was published never changes.
CREATE TABLE stack_versions (
    tenant    TEXT   NOT NULL,
    stack     TEXT   NOT NULL,
    version   TEXT   NOT NULL,
    sha256    TEXT   NOT NULL,
    published BIGINT NOT NULL,
    actor     TEXT   NOT NULL,
    key_id    TEXT   NOT NULL,
    envelope  TEXT   NOT NULL,
    PRIMARY KEY (tenant, stack, version),
    FOREIGN KEY (tenant, stack) REFERENCES stacks (tenant, name)
);
CREATE UNIQUE INDEX stack_versions_by_sha256 ON stack_versions (tenant, sha256);

-- +goose Down
DROP TABLE stack_versions;
DROP TABLE stacks;
DROP TABLE systems;
DROP TABLE blobs;
