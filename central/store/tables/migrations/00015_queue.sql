-- The approval queue by trust: a page of those for whom somebody vouches is
-- found however many others wait.
-- +goose Up
CREATE INDEX requests_by_trust ON requests (tenant, state, identity, first_seen, id);

-- +goose Down
DROP INDEX requests_by_trust;
