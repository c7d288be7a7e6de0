-- Rollouts: a stack version that goes to many sites in waves.
-- +goose Up
CREATE TABLE rollouts (
    tenant   TEXT   NOT NULL,
    name     TEXT   NOT NULL,
    state    TEXT   NOT NULL,
    revision BIGINT NOT NULL,
    body     TEXT   NOT NULL,
    PRIMARY KEY (tenant, name)
);
CREATE INDEX rollouts_by_state ON rollouts (state, tenant, name);

-- +goose Down
DROP TABLE rollouts;
