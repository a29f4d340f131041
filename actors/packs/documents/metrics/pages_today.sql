SELECT customer, sum(pages) AS pages, sum(cost) AS cost, count(*) AS tasks
FROM documents.tasks
WHERE status = 'done'
GROUP BY cumulate(ts, INTERVAL '1 hour', INTERVAL '1 day'), customer
