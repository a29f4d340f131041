-- Monitor new users: who came and opened an auction within the same ten seconds, and how many.
SELECT p.person, p.name, count(*) AS auctions
FROM nexmark.persons AS p JOIN nexmark.auctions AS a ON p.person = a.seller
GROUP BY tumble(p.ts, INTERVAL '10 seconds'), p.person, p.name
