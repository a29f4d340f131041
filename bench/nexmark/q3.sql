-- Local item suggestion: who sells in particular states. The standard joins all that ever came. Here an auction finds
-- whoever came within an hour of it.
SELECT p.name, p.city, p.state, a.auction, count(*) AS sellers
FROM nexmark.auctions AS a JOIN nexmark.persons AS p ON a.seller = p.person AND ABS(a.ts - p.ts) <= INTERVAL '1 hour'
WHERE a.category = 10 AND p.state IN ('or', 'id', 'ca')
GROUP BY tumble(a.ts, INTERVAL '10 seconds'), p.name, p.city, p.state, a.auction
