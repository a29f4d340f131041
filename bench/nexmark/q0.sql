-- Pass-through: every bid as it is. A metric has windows, so equal bids of a second are one row with their number.
SELECT auction, bidder, price, ts, count(*) AS bids FROM nexmark.bids
GROUP BY tumble(ts, INTERVAL '1 second'), auction, bidder, price, ts
