-- Monitor new users: who came and opened an auction within the same ten seconds.
SELECT p.person, p.name
FROM nexmark.persons AS p JOIN nexmark.auctions AS a ON p.person = a.seller
GROUP BY tumble(ts, INTERVAL '10 seconds'), p.person, p.name
