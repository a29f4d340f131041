SELECT count(*) FILTER (WHERE event = 'page_view') AS views,
       count(*) FILTER (WHERE event = 'signup') AS signups,
       count(*) FILTER (WHERE event = 'subscription_created') AS subscriptions,
       coalesce(sum(value) FILTER (WHERE event = 'invoice_paid'), 0) AS revenue,
       coalesce(sum(value) FILTER (WHERE event = 'expense'), 0) AS burn
FROM analytics.events
GROUP BY hop(ts, INTERVAL '10 seconds', INTERVAL '10 minutes')
