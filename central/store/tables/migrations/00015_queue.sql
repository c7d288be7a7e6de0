-- The approval queue by trust: a page of those for whom somebody vouches is
-- found however many others wait. It counts the unverified, too, so that the
-- index that did is not needed any more. The index by state is made anew:
-- where SQLite thinks two equal, it takes the older one, and would read every
-- stranger to find those who are none.
-- +goose Up
DROP INDEX requests_by_identity;
DROP INDEX requests_by_state;
CREATE INDEX requests_by_trust ON requests (tenant, state, identity, first_seen, id);
CREATE INDEX requests_by_state ON requests (tenant, state, first_seen, id);

-- +goose Down
DROP INDEX requests_by_trust;
CREATE INDEX requests_by_identity ON requests (tenant, identity, state);
