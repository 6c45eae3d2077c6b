"""The doctor at a real cluster."""

from __future__ import annotations

import json

from click.testing import CliRunner

from daskshare.cli import main


def test_all_workers_are_asked(client, two_workers):
    address = two_workers.scheduler_address
    result = CliRunner().invoke(main, ["doctor", "--json", "--scheduler", address])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert set(checks) == {"this machine", "scheduler", *client.scheduler_info()["workers"]}
    by_name = {check["name"]: check for check in checks["scheduler"]}
    assert by_name["versions"]["found"].startswith("as here: daskshare ")
    assert by_name["plugin"]["status"] == "ok"


def test_what_is_required_is_asked_of_the_workers(client, two_workers):
    address = two_workers.scheduler_address
    result = CliRunner().invoke(main, ["doctor", "--require", "nvdec", "--scheduler", address])
    assert result.exit_code == 1
    assert "2 workers alike" in result.stdout
    assert "no GPU to decode with" in result.stdout
