-- Several processes on one database.
-- +goose Up
-- What each transaction changed, in the order of commits: others bring their
-- memory up to date by it, and who lost the connection in the middle of a
-- commit finds out by the token whether it counts. Only engines that several
-- processes use at once write here. A log: the program drops what is old.
CREATE TABLE changes (
    seq   BIGINT NOT NULL PRIMARY KEY,
    token TEXT   NOT NULL,
    body  TEXT   NOT NULL
);
CREATE UNIQUE INDEX changes_by_token ON changes (token);
-- Filing counts the unverified machines that wait. Without this index that
-- reads every request that waits, and filing n machines costs n * n.
CREATE INDEX requests_by_identity ON requests (tenant, identity, state);

-- +goose Down
DROP INDEX requests_by_identity;
DROP TABLE changes;
