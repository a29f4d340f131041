SELECT currency, sum(value) AS revenue, count(*) AS payments
FROM analytics.events
WHERE event = 'invoice_paid'
GROUP BY tumble(ts, INTERVAL '1 hour'), currency
