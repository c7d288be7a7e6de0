-- +goose Up
-- The newest requests of all states, a page at a time.
CREATE INDEX requests_by_time ON requests (tenant, first_seen DESC, id);

-- +goose Down
DROP INDEX requests_by_time;
