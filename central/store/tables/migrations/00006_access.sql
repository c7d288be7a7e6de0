-- Who may do what. A credential is whatever somebody shows to be let in: an
-- API token, a person's own token, a browser session. Only its SHA-256 is
-- kept. A binding gives a user or a group a role in a tenant ('*': the whole
-- centre). login_states are browser log-ins that are under way.
-- +goose Up
CREATE TABLE credentials (
    id        TEXT   NOT NULL PRIMARY KEY,
    hash      TEXT   NOT NULL,
    tenant    TEXT   NOT NULL,
    kind      TEXT   NOT NULL,
    holder    TEXT   NOT NULL,
    created   BIGINT NOT NULL,
    expires   BIGINT NOT NULL,
    idle      BIGINT NOT NULL,
    last_used BIGINT NOT NULL,
    revoked   BIGINT NOT NULL,
    body      TEXT   NOT NULL
);
CREATE UNIQUE INDEX credentials_by_hash ON credentials (hash);
CREATE INDEX credentials_by_tenant ON credentials (tenant, kind, id);
CREATE INDEX credentials_by_holder ON credentials (holder, kind, id);
CREATE INDEX credentials_by_end ON credentials (kind, expires);

CREATE TABLE bindings (
    tenant  TEXT   NOT NULL,
    id      TEXT   NOT NULL,
    subject TEXT   NOT NULL,
    created BIGINT NOT NULL,
    body    TEXT   NOT NULL,
    PRIMARY KEY (tenant, id)
);
CREATE INDEX bindings_by_subject ON bindings (subject, tenant, id);

CREATE TABLE login_states (
    hash    TEXT   NOT NULL PRIMARY KEY,
    expires BIGINT NOT NULL,
    body    TEXT   NOT NULL
);
CREATE INDEX login_states_by_end ON login_states (expires);

-- The tokens of before go on, as what they were: an administrator was one of
-- the whole centre.
INSERT INTO credentials (id, hash, tenant, kind, holder, created, expires, idle, last_used, revoked, body)
SELECT 'c-' || tenant || '-' || name, token, tenant, CASE role WHEN 'admin' THEN 'start' ELSE 'personal' END, name, created, 0, 0, 0, 0, '{"name":"from before"}'
FROM operators;
INSERT INTO bindings (tenant, id, subject, created, body)
SELECT CASE role WHEN 'admin' THEN '*' ELSE tenant END, 'b-' || tenant || '-' || name, 'user:' || name, created,
    '{"tenant":"' || CASE role WHEN 'admin' THEN '*' ELSE tenant END || '","role":"' || role || '"}'
FROM operators;
DROP TABLE operators;

-- +goose Down
DROP TABLE login_states;
DROP TABLE bindings;
DROP TABLE credentials;
