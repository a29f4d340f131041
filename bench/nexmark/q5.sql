-- Hot items: the auction with the most bids in the last ten seconds, every two seconds. Of auctions with
-- equally many bids the standard gives all, this gives the first by number.
SELECT auction, count(*) AS bids FROM nexmark.bids
GROUP BY hop(ts, INTERVAL '2 seconds', INTERVAL '10 seconds'), auction
ORDER BY bids DESC, auction LIMIT 1
