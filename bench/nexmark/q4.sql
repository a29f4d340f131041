-- Average price for a category: the mean of the winning bids of its auctions. Two metrics, the second over the rows of
-- the first, `winning_bids`. The standard's mean is of all time, this one of the auctions of a minute, none of which
-- lasts ten seconds.
SELECT a.auction, a.category, max(b.price) AS price
FROM nexmark.auctions AS a JOIN nexmark.bids AS b
  ON a.auction = b.auction AND b.ts BETWEEN a.ts AND a.ts + INTERVAL '10 seconds'
WHERE b.ts <= a.expires
GROUP BY tumble(a.ts, INTERVAL '10 seconds'), a.auction, a.category;
SELECT category, avg(price) AS price FROM winning_bids GROUP BY tumble(ts, INTERVAL '1 minute'), category
