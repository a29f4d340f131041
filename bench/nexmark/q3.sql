-- Local item suggestion: who sells in particular states.
SELECT p.name, p.city, p.state, a.auction
FROM nexmark.auctions AS a JOIN nexmark.persons AS p ON a.seller = p.person
WHERE a.category = 10 AND p.state IN ('or', 'id', 'ca')
