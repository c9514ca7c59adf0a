"""Metrics of one process, or of all that share a directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import metrics


def test_metrics_have_our_prefix_and_base_units():
    for metric in vars(metrics).values():
        if isinstance(metric, metrics.Counter | metrics.Gauge | metrics.Histogram):
            (family,) = metric.describe()
            assert family.name.startswith("darkroom_")
            assert family.documentation
            assert not family.name.endswith(("_ms", "_mib", "_count", "_total"))


def test_buckets_reach_from_a_step_to_a_long_wait():
    assert metrics.SECONDS[0] <= 0.005
    assert metrics.SECONDS[-1] >= 1200
    assert list(metrics.SECONDS) == sorted(metrics.SECONDS)
    assert list(metrics.ROWS) == sorted(metrics.ROWS)


def test_the_queues_are_read_at_each_scrape():
    queues = {"emoji-sd.high": (2, 1.5)}
    waiting = metrics.Waiting(lambda: queues)
    assert b'darkroom_queue_depth{queue="emoji-sd.high"} 2.0' in metrics.render(waiting)
    assert b'darkroom_queue_oldest_seconds{queue="emoji-sd.high"} 1.5' in metrics.render(waiting)
    queues["emoji-sd.high"] = (0, 0.0)
    assert b'darkroom_queue_depth{queue="emoji-sd.high"} 0.0' in metrics.render(waiting)


def test_what_the_api_counts_is_zero_from_the_start():
    metrics.started("1.2.3", ["a-model"])
    text = metrics.render().decode()
    assert 'darkroom_refused_total{model="a-model"} 0.0' in text
    assert f'darkroom_build_info{{python="{sys.version.split()[0]}",version="1.2.3"}} 1.0' in text


@pytest.mark.parametrize("processes", [2])
def test_processes_that_share_a_directory_are_added_up(tmp_path: Path, processes: int):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    worker = """
from app import metrics
metrics.STEPS.labels("m").inc(3)
metrics.BATCH_WIDTH.labels("m").set(8)
metrics.QUEUE_WAIT.labels("m").observe(0.2)
"""
    for _ in range(processes):
        subprocess.run([sys.executable, "-c", worker], env=environment, check=True)
    api = "from app import metrics; print(metrics.render(metrics.Waiting(lambda: {'m.low': (1, 2.0)})).decode())"
    text = subprocess.check_output([sys.executable, "-c", api], env=environment, text=True)
    assert 'darkroom_steps_total{model="m"} 6.0' in text
    assert 'darkroom_batch_width_rows{model="m"} 8.0' in text
    assert 'darkroom_queue_wait_seconds_bucket{le="0.25",model="m"} 2.0' in text
    assert 'darkroom_queue_wait_seconds_bucket{le="0.1",model="m"} 0.0' in text
    assert 'darkroom_queue_depth{queue="m.low"} 1.0' in text
