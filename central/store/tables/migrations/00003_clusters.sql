-- Sites that form clusters: documents are found by site, nodes keep their
-- in-site address for ever, reports, orders and escrow have tables of their
-- own.
-- +goose Up
ALTER TABLE documents ADD COLUMN site TEXT NOT NULL DEFAULT '';
-- Admissions are the only documents of the first schema. One that was made for
-- another site than the node's present one is not worth finding: the node has
-- none there.
UPDATE documents SET site = COALESCE(
    (SELECT n.site FROM nodes n WHERE n.tenant = documents.tenant AND n.id = documents.name), '')
    WHERE kind = 'admission';
-- replaced is 1 for a document that a newer one of its kind and name at the
-- same site (and of the same incarnation) made void: it is kept, not served.
ALTER TABLE documents ADD COLUMN replaced BIGINT NOT NULL DEFAULT 0;
CREATE INDEX documents_by_site ON documents (tenant, site, replaced, epoch, version);

-- address is an IPv4 address as a number.
CREATE TABLE addresses (
    tenant  TEXT   NOT NULL,
    site    TEXT   NOT NULL,
    node    TEXT   NOT NULL,
    address BIGINT NOT NULL,
    PRIMARY KEY (tenant, site, node),
    FOREIGN KEY (tenant, site) REFERENCES sites (tenant, name)
);
CREATE UNIQUE INDEX addresses_by_address ON addresses (tenant, site, address);

CREATE TABLE reports (
    tenant TEXT NOT NULL,
    node   TEXT NOT NULL,
    site   TEXT NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (tenant, node),
    FOREIGN KEY (tenant, node) REFERENCES nodes (tenant, id)
);
CREATE INDEX reports_by_site ON reports (tenant, site, node);

CREATE TABLE orders (
    tenant   TEXT   NOT NULL,
    id       TEXT   NOT NULL,
    site     TEXT   NOT NULL,
    node     TEXT   NOT NULL,
    state    TEXT   NOT NULL,
    epoch    BIGINT NOT NULL,
    version  BIGINT NOT NULL,
    ends     BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL,
    envelope TEXT   NOT NULL,
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, node) REFERENCES nodes (tenant, id)
);
CREATE INDEX orders_by_node ON orders (tenant, node, epoch, version);
CREATE INDEX orders_by_site ON orders (tenant, site, epoch, version);
CREATE INDEX orders_by_state ON orders (tenant, state, ends);

-- The bytes are files: the database knows which of them count.
CREATE TABLE escrow (
    tenant TEXT   NOT NULL,
    id     TEXT   NOT NULL,
    site   TEXT   NOT NULL,
    node   TEXT   NOT NULL,
    size   BIGINT NOT NULL,
    stored BIGINT NOT NULL,
    body   TEXT   NOT NULL,
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, site) REFERENCES sites (tenant, name)
);
CREATE INDEX escrow_by_site ON escrow (tenant, site, stored);

-- +goose Down
DROP TABLE escrow;
DROP TABLE orders;
DROP TABLE reports;
DROP TABLE addresses;
DROP INDEX documents_by_site;
ALTER TABLE documents DROP COLUMN replaced;
ALTER TABLE documents DROP COLUMN site;
