import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import dask
import dask.cli
import pytest
from click.testing import CliRunner

import daskshare.cli
import daskshare.results.detect
from daskshare.cli import main
from daskshare.errors import DaskshareError, DownloadError
from daskshare.results.parquet import ChunkRecord
from daskshare.results.summary import DetectSummary


def summary(**changes):
    fields = {
        "output": Path("/out"),
        "videos": 1,
        "chunks": 2,
        "frames": 20,
        "num_detections": 3,
        "counts_by_class": {"car": 2, "bus": 1},
        "new_chunks": 2,
        "new_frames": 20,
        "seconds": 2.0,
        "frames_per_second": 15.0,
        "failed": (),
        "truncated": (),
        "decoders": {"pyav": 20},
        "model": "yolov3-tiny",
        "model_loads": 1,
        "model_copies": 1,
        "model_bytes": 35_000_000,
        "concurrent_tasks": 4,
    }
    return DetectSummary(**(fields | changes))


FAILED = ChunkRecord("a.mp4", 1, 10, 0, 0, "error", "a.mp4 is no video")


@pytest.fixture
def calls(monkeypatch):
    """What the command hands to detect_on, which answers with ``calls.answer``."""

    class Calls(list):
        answer = summary()

    calls = Calls()

    def detect_on(connect, paths, model, output, **options):
        calls.append({"paths": paths, "model": model, "output": output, **options})
        if isinstance(calls.answer, BaseException):
            raise calls.answer
        return calls.answer

    monkeypatch.setattr(daskshare.results.detect, "detect_on", detect_on)
    return calls


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_defaults(calls):
    result = run("detect", "a.mp4", "b.mp4", "--output", "out")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call["paths"] == ["a.mp4", "b.mp4"]
    assert call["output"] == "out"
    assert call["model"].spec.name == "yolov3-tiny"
    assert call["model"].spec.confidence_threshold == 0.25
    assert call["model"].spec.iou_threshold == 0.45
    assert call["chunk_seconds"] is None
    assert (call["annotate"], call["overwrite"], call["progress"]) == (False, False, False)


def test_options_reach_the_model_and_the_run(calls):
    result = run(
        *("detect", "a.mp4", "-o", "out", "--input-size", "320", "--confidence", "0.5"),
        *("--iou", "0.3", "--precision", "fp32", "--classes", "car, bus", "--chunk-seconds", "2.5"),
        *("--annotate", "--overwrite", "--progress"),
    )
    assert result.exit_code == 0, result.output
    (call,) = calls
    spec = call["model"].spec
    assert spec.confidence_threshold == 0.5
    assert spec.iou_threshold == 0.3
    assert spec.input_size in (320, (320, 320))
    assert spec.precision == "fp32"
    assert call["chunk_seconds"] == 2.5
    assert (call["annotate"], call["overwrite"], call["progress"]) == (True, True, True)
    assert run("detect", "a.mp4", "-o", "out").exit_code == 0
    assert calls[1]["model"].spec.key != spec.key


@pytest.mark.parametrize(
    "args",
    [
        ["detect"],
        ["detect", "a.mp4"],
        ["detect", "-o", "out"],
        ["detect", "a.mp4", "-o", "out", "--confidence", "1.5"],
        ["detect", "a.mp4", "-o", "out", "--precision", "int8"],
        ["detect", "a.mp4", "-o", "out", "--classes", "car,,bus"],
        ["detect", "a.mp4", "-o", "out", "--chunk-seconds", "0"],
        ["detect", "a.mp4", "-o", "out", "--scheduler", "tcp://x:1", "--threads", "2"],
        ["detekt"],
        ["fetch"],
    ],
)
def test_wrong_usage_is_status_2_and_runs_nothing(calls, args):
    assert run(*args).exit_code == 2
    assert calls == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--classes", "cat,bicycel"], "bicycle"),
        (["--model", "yolov3-tinny"], "yolov3-tiny"),
    ],
)
def test_a_misspelt_name_is_one_message_with_a_suggestion(calls, args, said):
    result = run("detect", "a.mp4", "-o", "out", *args)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert calls == []


def test_an_error_is_one_message_and_status_1(calls):
    calls.answer = DaskshareError("the disk is full")
    result = run("detect", "a.mp4", "-o", "out")
    assert result.exit_code == 1
    assert result.stderr == "Error: the disk is full\n"


def test_failed_chunks_have_a_status_of_their_own_and_are_named(calls):
    calls.answer = summary(failed=(FAILED,))
    result = run("detect", "a.mp4", "-o", "out")
    assert result.exit_code == 3
    assert "a.mp4 is no video" in result.stderr
    assert "20 frames of 1 video" in result.stdout


def test_an_interrupt_tells_how_to_go_on(calls):
    calls.answer = KeyboardInterrupt()
    calls.answer.add_note("1 of 2 chunks are in out; the same call does the rest.")
    result = run("detect", "a.mp4", "-o", "out")
    assert result.exit_code == 130
    assert "the same call does the rest" in result.stderr


def test_sigterm_counts_as_an_interrupt(monkeypatch):
    def detect_on(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not interrupt")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(daskshare.results.detect, "detect_on", detect_on)
    assert run("detect", "a.mp4", "-o", "out").exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_fetch_prints_the_path_or_the_advice(monkeypatch):
    import daskshare.models.fetch

    monkeypatch.setattr(
        daskshare.models.fetch, "fetch", lambda name, progress: Path("/cache") / name
    )
    assert run("fetch", "yolov3").stdout == "/cache/yolov3\n"

    def offline(name, progress):
        raise DownloadError("put the file there", name=name, path="/cache/x")

    monkeypatch.setattr(daskshare.models.fetch, "fetch", offline)
    result = run("fetch", "yolov3")
    assert (result.exit_code, result.stderr) == (1, "Error: put the file there\n")


def test_an_unreachable_scheduler_is_one_message(tmp_path, monkeypatch):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"no video")
    with dask.config.set({"distributed.comm.timeouts.connect": "100ms"}):
        result = run("detect", video, "-o", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:1")
    assert result.exit_code == 1
    assert "No Dask scheduler answers at 'tcp://127.0.0.1:1'" in result.stderr


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys\n"
        "from daskshare.cli import main\n"
        "for args in (['--version'], ['detect', '--help']):\n"
        "    try:\n"
        "        main(args)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, end.code\n"
        "heavy = {'torch', 'distributed', 'cv2', 'av', 'pandas', 'pyarrow', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_summary_tells_frames_classes_and_sharing():
    text = str(summary(truncated=(FAILED,)))
    assert "20 frames of 1 video, 3 detections in /out" in text
    assert "found car 2, bus 1" in text
    assert "One copy of yolov3-tiny (35.0 MB of weights, 1 load) served up to 4 tasks" in text
    assert "105.0 MB more" in text
    assert "truncated: chunk 1 (from frame 10): a.mp4 is no video" in text


def test_summary_claims_no_saving_where_nothing_was_shared():
    assert summary(concurrent_tasks=1).memory_saved_bytes == 0
    assert "would have taken" not in str(summary(concurrent_tasks=1))
    assert summary(concurrent_tasks=0, model_copies=0).sharing() == ""
    assert summary(model_copies=2).memory_saved_bytes == 70_000_000


# -- doctor --


@pytest.fixture
def machine(monkeypatch):
    """Let the doctor examine a made-up machine; returns a setter."""
    from daskshare.doctor import probe
    from tests.unit.doctor.test_checks import CPU

    def examine(found=CPU):
        monkeypatch.setattr(probe, "probe_machine", lambda: found)

    examine()
    return examine


def test_doctor_on_a_whole_machine(machine):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "All is well." in result.stdout


def test_doctors_status_tells(machine):
    assert run("doctor", "--require", "gpu").exit_code == 1
    assert run("doctor", "--require", "gpus").exit_code == 2


def test_doctor_as_json(machine):
    result = run("doctor", "--json", "--require", "spark")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["exit_status"], answer["status"]) == (1, 1, "error")
    [spark] = [c for c in answer["checks"]["this machine"] if c["name"] == "Spark"]
    assert spark["fix"] == "pip install 'daskshare[spark]'"


def test_doctor_strict(machine):
    from tests.unit.doctor.test_checks import CPU, change

    machine(change(CPU, h264_encoder=False))
    assert run("doctor").exit_code == 0
    assert run("doctor", "--strict").exit_code == 1


# -- what users of dask and git expect --


def test_it_is_also_a_command_of_dask():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    [(name, target)] = project["project"]["entry-points"]["dask_cli"].items()
    dask_command = click.Group("dask")
    dask.cli._register_command_ep(dask_command, EntryPoint(name, target, "dask_cli"))
    result = CliRunner().invoke(dask_command, ["daskshare", "detekt"])
    assert result.exit_code == 2
    assert "Usage: dask daskshare [OPTIONS]" in result.stderr
    assert "Did you mean 'detect'" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["detekt"], "Did you mean 'detect'"),
        (["detect", "a.mp4", "--clases", "car"], "'--classes'"),
        (["doctor", "--jsn"], "'--json'"),
        (["detect", "a.mp4", "-o", "out", "--precision", "f16"], "'fp32', 'fp16', 'bf16'"),
    ],
)
def test_misspelt_words_get_a_suggestion(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_misspelt_option_in_dasks_configuration_gets_a_suggestion(machine):
    from daskshare.doctor.probe import _config_problems

    with dask.config.set({"daskshare.engine.max-wiat": "1ms"}):
        [problem] = _config_problems()
    assert "Did you mean daskshare.engine.max-wait?" in problem


def test_every_command_and_option_has_a_help_text():
    for name, command in main.commands.items():
        assert command.help, name
        assert len(command.get_short_help_str(limit=60)) < 60, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


def complete(*words):
    from click.shell_completion import ShellComplete

    *args, incomplete = words
    offered = ShellComplete(main, {}, "daskshare", "_DASKSHARE_COMPLETE").get_completions(
        args, incomplete
    )
    return [item.value for item in offered]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["de"], ["demo", "detect"]),
        (["detect", "--conf"], ["--confidence"]),
        (["detect", "--precision", "f"], ["fp32", "fp16"]),
        (["detect", "--model", "yolov3-"], ["yolov3-spp", "yolov3-tiny"]),
        (["fetch", "yolov3-t"], ["yolov3-tiny"]),
        (["detect", "--classes", "tra"], ["traffic light", "train"]),
        (
            ["detect", "--classes", "car,bus,tr"],
            ["car,bus,truck", "car,bus,train", "car,bus,traffic light"],
        ),
        (["detect", "--classes", "truck,tr"], ["truck,train", "truck,traffic light"]),
        (["detect", "--names", "/no/such/file", "--classes", "c"], []),
        (["doctor", "--require", "nv"], ["nvdec"]),
    ],
)
def test_completions(words, expected):
    assert sorted(complete(*words)) == sorted(expected)


@pytest.mark.parametrize("words", [[], ["--cfg"], ["a.mp4", "--weights"], ["--output"]])
def test_the_shell_completes_files_where_files_are_meant(words):
    from click.shell_completion import ShellComplete

    shell = ShellComplete(main, {}, "daskshare", "_DASKSHARE_COMPLETE")
    [offered] = shell.get_completions(["detect", *words], "cams/")
    assert offered.type == "file"


def test_classes_of_an_own_network_are_completed(tmp_path):
    names = tmp_path / "own.names"
    names.write_text("lorry\nloader\n\ntram\n")
    assert complete("detect", "--names", str(names), "--classes", "lo") == ["lorry", "loader"]


def test_the_shells_script_is_clicks_own():
    done = subprocess.run(
        [sys.executable, "-c", "from daskshare.cli import main; main(prog_name='daskshare')"],
        env={**os.environ, "_DASKSHARE_COMPLETE": "zsh_source"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "#compdef daskshare" in done.stdout


LEVELS = (
    "import logging, distributed, daskshare\n"
    "logger = logging.getLogger('daskshare.engine')\n"
    "print(logging.getLevelName(logger.getEffectiveLevel()))\n"
    "logger.info('seen'); logger.debug('unseen')\n"
)


def test_dasks_configuration_sets_the_log_level():
    done = subprocess.run(
        [sys.executable, "-c", LEVELS],
        env={**os.environ, "DASK_LOGGING__DASKSHARE": "info"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "INFO\n"
    assert "daskshare.engine - INFO - seen" in done.stderr
    assert "unseen" not in done.stderr


@pytest.mark.parametrize(("flag", "level"), [("-v", "INFO"), ("-vv", "DEBUG")])
@pytest.mark.parametrize("early", ["", "import distributed\n"])
def test_verbose_is_dasks_log_level(flag, level, early):
    code = (
        f"{early}from daskshare.cli import main\n"
        f"main([{flag!r}, 'fetch', 'yolov3-tiny'], standalone_mode=False)\n{LEVELS}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == level


def test_all_loggers_are_in_the_packages_tree():
    package = Path(daskshare.cli.__file__).parent
    for path in package.rglob("*.py"):
        for name in re.findall(r"getLogger\(([^)]*)\)", path.read_text("utf-8")):
            assert name == "__name__" or name.strip("\"'").split(".")[0] == "daskshare", path
