-- Average price for a category: the mean of the winning bids of all closed auctions.
SELECT category, avg(final) AS price
FROM (
  SELECT max(b.price) AS final, a.category
  FROM nexmark.auctions AS a JOIN nexmark.bids AS b ON a.auction = b.auction
  WHERE b.ts BETWEEN a.ts AND a.expires
  GROUP BY a.auction, a.category
)
GROUP BY category
