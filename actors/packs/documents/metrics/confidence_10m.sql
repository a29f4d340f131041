SELECT field, avg(confidence) AS confidence, count(*) AS results, count(*) FILTER (WHERE confidence < 0.8) AS doubtful
FROM documents.results
GROUP BY hop(ts, INTERVAL '1 minute', INTERVAL '10 minutes'), field
