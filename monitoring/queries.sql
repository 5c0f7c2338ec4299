-- Queries of the prediction log: python ask.py NAME. Each begins with `-- name: NAME` and one line of description.
-- `predictions` has a row for each predicted row, `labels` a row for each label: id, row, target.

-- name: versions
-- requests, latency and mean answer of each version
SELECT server, version, count(DISTINCT id) AS requests, count(*) AS rows,
       count(DISTINCT id) FILTER (status >= 500) AS failed,
       round(quantile_cont(ms::DOUBLE, 0.5), 2) AS p50_ms, round(quantile_cont(ms::DOUBLE, 0.99), 2) AS p99_ms,
       round(avg(benign), 3) AS mean_benign
FROM predictions GROUP BY ALL ORDER BY ALL;

-- name: newest
-- the ten newest predictions
SELECT strftime(time, '%H:%M:%S') AS time, id, row, server, version, status, round(ms::DOUBLE, 2) AS ms, round(benign, 4) AS benign, note
FROM predictions  -- first from when on they are: of millions of rows that reads the times only
WHERE predictions.time >= (SELECT min(time) FROM (SELECT time FROM predictions ORDER BY time DESC LIMIT 10))
ORDER BY predictions.time DESC, row LIMIT 10;

-- name: failures
-- requests without a prediction, by reason
SELECT server, version, status, note, count(DISTINCT id) AS requests
FROM predictions WHERE benign IS NULL GROUP BY ALL ORDER BY requests DESC LIMIT 20;

-- name: accuracy
-- how often each version was right, for the rows whose label has come
SELECT server, version, count(*) AS labelled, round(avg(((benign >= 0.5) = (target = 1))::INT), 3) AS accuracy,
       round(avg((benign - target) ** 2), 4) AS brier_score
FROM predictions JOIN (SELECT id, row, first(target) AS target FROM labels GROUP BY ALL) USING (id, row)
WHERE benign IS NOT NULL GROUP BY ALL ORDER BY ALL;

-- name: minutes
-- requests and latency of the last ten minutes
SELECT strftime(time_bucket(INTERVAL 1 minute, time), '%H:%M') AS minute, server, version,
       count(DISTINCT id) AS requests, round(quantile_cont(ms::DOUBLE, 0.99), 2) AS p99_ms
FROM predictions WHERE time > now()::TIMESTAMP - INTERVAL 10 minute GROUP BY ALL ORDER BY ALL;

-- name: confident-errors
-- the most confident mistakes: look at these first
SELECT id, row, server, version, round(benign, 4) AS benign, target
FROM predictions JOIN labels USING (id, row)
WHERE (benign >= 0.5) <> (target = 1) ORDER BY abs(benign - 0.5) DESC LIMIT 10;
