-- Highest bid: the highest bid of every ten seconds. Of equally high bids the standard gives all, this gives
-- the first by auction and bidder.
SELECT auction, bidder, price FROM nexmark.bids
GROUP BY tumble(ts, INTERVAL '10 seconds'), auction, bidder, price
ORDER BY price DESC, auction, bidder LIMIT 1
