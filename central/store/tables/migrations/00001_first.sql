-- Only TEXT and BIGINT, no engine's own functions, sequence numbers given out
-- by the program: the same statements run on PostgreSQL. Times are Unix
-- nanoseconds (0: never). Columns named body hold JSON of the fleet object;
-- the columns beside it are those that queries, locks or constraints need.
-- +goose Up
CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE tenants (
    name     TEXT   NOT NULL PRIMARY KEY,
    lab      BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL
);

CREATE TABLE sites (
    tenant   TEXT   NOT NULL REFERENCES tenants (name),
    name     TEXT   NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- last_seen is no part of body and of no index: heartbeats rewrite it in
-- batches and must not touch anything else.
CREATE TABLE nodes (
    tenant     TEXT   NOT NULL REFERENCES tenants (name),
    id         TEXT   NOT NULL,
    words      TEXT   NOT NULL,
    state      TEXT   NOT NULL,
    site       TEXT   NOT NULL,
    ek         TEXT   NOT NULL,
    ldevid_key TEXT   NOT NULL,
    revision   BIGINT NOT NULL,
    last_seen  BIGINT NOT NULL,
    body       TEXT   NOT NULL,
    PRIMARY KEY (tenant, id)
);
CREATE UNIQUE INDEX nodes_by_ek ON nodes (tenant, ek);
CREATE INDEX nodes_by_site ON nodes (tenant, site, id);
CREATE INDEX nodes_by_words ON nodes (tenant, words);

CREATE TABLE requests (
    tenant     TEXT   NOT NULL REFERENCES tenants (name),
    id         TEXT   NOT NULL,
    node       TEXT   NOT NULL,
    words      TEXT   NOT NULL,
    state      TEXT   NOT NULL,
    identity   TEXT   NOT NULL,
    serial     TEXT   NOT NULL,
    uuid       TEXT   NOT NULL,
    digest     TEXT   NOT NULL,
    first_seen BIGINT NOT NULL,
    revision   BIGINT NOT NULL,
    body       TEXT   NOT NULL,
    PRIMARY KEY (tenant, id)
);
-- A node has one live request; the database holds that line, too.
CREATE UNIQUE INDEX requests_one_live ON requests (tenant, node)
    WHERE state IN ('pending', 'approved', 'issued', 'quarantined', 'rejected');
CREATE INDEX requests_by_node ON requests (tenant, node, first_seen);
-- Serial and UUID are claims: they are searched for look-alikes, no more.
CREATE INDEX requests_by_serial ON requests (tenant, serial);
CREATE INDEX requests_by_uuid ON requests (tenant, uuid);
CREATE INDEX requests_by_words ON requests (tenant, words);
CREATE INDEX requests_by_state ON requests (tenant, state, first_seen, id);

-- What was handed out, kept for ever: one row per certificate.
CREATE TABLE issued (
    tenant     TEXT   NOT NULL REFERENCES tenants (name),
    serial     TEXT   NOT NULL,
    request    TEXT   NOT NULL,
    node       TEXT   NOT NULL,
    ldevid_key TEXT   NOT NULL,
    not_before BIGINT NOT NULL,
    not_after  BIGINT NOT NULL,
    body       TEXT   NOT NULL,
    PRIMARY KEY (tenant, serial),
    FOREIGN KEY (tenant, request) REFERENCES requests (tenant, id)
);
CREATE INDEX issued_by_request ON issued (tenant, request, not_after);

CREATE TABLE images (
    tenant  TEXT NOT NULL REFERENCES tenants (name),
    name    TEXT NOT NULL,
    version TEXT NOT NULL,
    arch    TEXT NOT NULL,
    sha256  TEXT NOT NULL,
    body    TEXT NOT NULL,
    PRIMARY KEY (tenant, name, version, arch)
);
CREATE UNIQUE INDEX images_by_sha256 ON images (tenant, sha256);

CREATE TABLE release_keys (
    tenant TEXT   NOT NULL REFERENCES tenants (name),
    keyid  TEXT   NOT NULL,
    pem    TEXT   NOT NULL,
    added  BIGINT NOT NULL,
    PRIMARY KEY (tenant, keyid)
);

-- One row per denied EK: a machine with three EKs has three rows.
CREATE TABLE denials (
    tenant TEXT   NOT NULL REFERENCES tenants (name),
    ek     TEXT   NOT NULL,
    node   TEXT   NOT NULL,
    reason TEXT   NOT NULL,
    actor  TEXT   NOT NULL,
    at     BIGINT NOT NULL,
    PRIMARY KEY (tenant, ek)
);
CREATE INDEX denials_by_node ON denials (tenant, node);

CREATE TABLE preapprovals (
    tenant   TEXT   NOT NULL REFERENCES tenants (name),
    name     TEXT   NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- Every EK that an operator named beforehand, and in which pre-approval.
CREATE TABLE listed_eks (
    tenant      TEXT NOT NULL,
    ek          TEXT NOT NULL,
    preapproval TEXT NOT NULL,
    PRIMARY KEY (tenant, ek, preapproval),
    FOREIGN KEY (tenant, preapproval) REFERENCES preapprovals (tenant, name)
);

-- Signed documents (DSSE envelopes): admissions, removals, charters, orders.
CREATE TABLE documents (
    tenant   TEXT   NOT NULL REFERENCES tenants (name),
    kind     TEXT   NOT NULL,
    name     TEXT   NOT NULL,
    epoch    BIGINT NOT NULL,
    version  BIGINT NOT NULL,
    at       BIGINT NOT NULL,
    envelope TEXT   NOT NULL,
    PRIMARY KEY (tenant, kind, name, epoch, version)
);

-- A ring: the program removes what is older than the newest N.
CREATE TABLE events (
    tenant TEXT   NOT NULL REFERENCES tenants (name),
    seq    BIGINT NOT NULL,
    body   TEXT   NOT NULL,
    PRIMARY KEY (tenant, seq)
);

CREATE TABLE audit (
    tenant TEXT   NOT NULL REFERENCES tenants (name),
    seq    BIGINT NOT NULL,
    hash   TEXT   NOT NULL,
    body   TEXT   NOT NULL,
    PRIMARY KEY (tenant, seq)
);

CREATE TABLE cookie_keys (
    id      BIGINT NOT NULL PRIMARY KEY,
    created BIGINT NOT NULL,
    sealed  TEXT   NOT NULL
);

-- Bearer tokens are kept as SHA-256; the token itself is never stored.
CREATE TABLE operators (
    tenant  TEXT   NOT NULL REFERENCES tenants (name),
    name    TEXT   NOT NULL,
    role    TEXT   NOT NULL,
    token   TEXT   NOT NULL,
    created BIGINT NOT NULL,
    PRIMARY KEY (tenant, name)
);
CREATE UNIQUE INDEX operators_by_token ON operators (token);

-- +goose Down
DROP TABLE operators;
DROP TABLE cookie_keys;
DROP TABLE audit;
DROP TABLE events;
DROP TABLE documents;
DROP TABLE listed_eks;
DROP TABLE preapprovals;
DROP TABLE denials;
DROP TABLE release_keys;
DROP TABLE images;
DROP TABLE issued;
DROP TABLE requests;
DROP TABLE nodes;
DROP TABLE sites;
DROP TABLE tenants;
DROP TABLE settings;
