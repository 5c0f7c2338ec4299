"""The record of a load test: percentiles to the microsecond, workers that add up, and a size that stays small."""

import json

import numpy as np

from client.load_record import MOST_SLICES, LoadRecord


def fill(record: LoadRecord, sent_s: np.ndarray, latencies_s: np.ndarray) -> LoadRecord:
    for sent, latency in zip(sent_s, latencies_s, strict=True):
        record.note_answer(float(sent), float(latency))
    return record


def test_a_records_percentiles_are_numpys_to_the_microsecond():
    random = np.random.default_rng(0)
    latencies_s = random.lognormal(-8, 0.7, 20_000)
    record = fill(LoadRecord(), 1e9 + np.sort(random.uniform(0, 10, 20_000)), latencies_s)
    whole = record.list_rows()[-1]
    for percent in (50, 90, 99, 99.9):
        assert abs(whole[f"p{percent:g}_ms"] - np.percentile(latencies_s, percent) * 1000) <= 1.1e-3
    assert sum(row["right_answers"] for row in record.list_rows()[:-1]) == whole["right_answers"] == 20_000
    assert abs(record.rate - 2000) < 20


def test_a_percentile_is_withheld_where_too_few_requests_lie_beyond_it():
    row = fill(LoadRecord(), np.linspace(0, 1, 999), np.full(999, 0.001)).list_rows()[-1]
    assert row["p90_ms"] == 1.0
    assert row["p99_ms"] is None


def test_workers_records_together_are_the_record_of_all():
    random = np.random.default_rng(1)
    sent_s, latencies_s = 1e9 + np.sort(random.uniform(0, 100, 3000)), random.exponential(0.02, 3000)
    together = fill(LoadRecord(), sent_s, latencies_s)
    merged = LoadRecord()
    for part in range(3):
        worker = fill(LoadRecord(), sent_s[part::3], latencies_s[part::3])
        merged.merge(json.loads(json.dumps(worker.to_dict())))
    assert merged == together


def test_a_record_of_a_long_run_stays_small():
    seconds = 6 * 3600
    record = fill(LoadRecord(), np.arange(seconds), np.linspace(1e-4, 2, seconds))
    assert len(record.slices) <= MOST_SLICES
    assert record.count == seconds
    assert abs(np.percentile(record.latencies_s, 99) / np.percentile(np.linspace(1e-4, 2, seconds), 99) - 1) < 1e-3
