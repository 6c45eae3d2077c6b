"""Workers' reports as plain data, with what a test does not care about filled in."""

from __future__ import annotations


def model(name="m", **changes):
    engine = {
        "queue_frames": 0,
        "queue_age_seconds": 0.0,
        "ceiling": 8,
        "mode": "eager",
        **changes.pop("engine", {}),
    }
    values = {
        "name": name,
        "key": f"key-of-{name}",
        "state": "ready",
        "loads": 1,
        "leases": 0,
        "peak_leases": 1,
        "model_bytes": 100,
        "frames": 0,
        "batches": 0,
        "batch_size_counts": {},
        "busy_seconds": 0.0,
        "errors": 0,
        "load_error": "",
        "rebuilds": 0,
        **changes,
    }
    return {**values, "engine": engine if values["state"] == "ready" else None}


def report(share="s", *models, time_fraction=None, rates=None, **changes):
    return {
        "state": "ready",
        "reason": "",
        "share": share,
        "device": {
            "kind": "cuda",
            "index": 0,
            "uuid": f"GPU-{share}",
            "name": "big one",
            "total_bytes": 1000,
        },
        "budget_bytes": 800,
        "spent_seconds": {"busy": 1.0, "scheduler": 3.0},
        "models": {m["key"]: m for m in models},
        "batch_bins": {},
        "recent": {
            "seconds": 5.0,
            "time_fraction": time_fraction or {"busy": 0.25, "scheduler": 0.75},
            "frames": 0,
            "batches": 0,
            "batch_bins": {},
            "frames_per_second": rates or {},
        },
        "chunks": {
            "chunks": 9,
            "frames": 90,
            "chunks_failed": 1,
            "chunks_incomplete": 2,
            "chunks_aborted": 3,
            "decoder_nvdec": 4,
            "decoder_pyav": 5,
        },
        **changes,
    }
