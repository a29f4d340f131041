-- Currency conversion: every bid with its price in euros. Equal bids of a second are one row with their number.
SELECT auction, bidder, 0.908 * price AS price, ts, count(*) AS bids FROM nexmark.bids
GROUP BY tumble(ts, INTERVAL '1 second'), auction, bidder, 0.908 * price, ts
