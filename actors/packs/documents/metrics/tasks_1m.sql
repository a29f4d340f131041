SELECT kind,
       count(*) FILTER (WHERE status = 'queued') AS queued,
       count(*) FILTER (WHERE status = 'done') AS done,
       count(*) FILTER (WHERE status = 'failed') AS failed,
       approx_percentile_cont(elapsed_ms, 0.95) FILTER (WHERE status = 'done') AS p95_ms,
       sum(pages) FILTER (WHERE status = 'done') AS pages
FROM documents.tasks
GROUP BY tumble(ts, INTERVAL '1 minute'), kind
