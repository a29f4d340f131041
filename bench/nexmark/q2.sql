-- Selection: bids on some auctions. Equal bids of a second are one row with their number.
SELECT auction, price, count(*) AS bids FROM nexmark.bids WHERE auction % 123 = 0
GROUP BY tumble(ts, INTERVAL '1 second'), auction, price
