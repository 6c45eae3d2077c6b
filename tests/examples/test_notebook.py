"""The notebook runs top to bottom and shows what it promises."""

from __future__ import annotations

import os
import warnings

import nbformat
import pytest

from tests.examples.conftest import FIRST, LAST, ROOT, TIMEOUT

pytestmark = pytest.mark.timeout(2 * TIMEOUT)

NOTEBOOK = ROOT / "examples" / "notebooks" / "traffic.ipynb"


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs():
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def executed(short_clip, tmp_path_factory):
    """The notebook after a run on the short clip."""
    with warnings.catch_warnings():
        # Jupyter's own, on machines whose configuration lies in the old folders.
        warnings.simplefilter("ignore", DeprecationWarning)
        from nbclient import NotebookClient
    notebook = read()
    at = next(i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ()))
    given = nbformat.v4.new_code_cell(f"videos = [{str(short_clip)!r}]")
    notebook.cells.insert(at + 1, given)
    folder = tmp_path_factory.mktemp("notebook")
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3")
    client.execute(cwd=str(folder), env=environment)
    return notebook


def outputs(notebook, words):
    """Outputs of the code cell whose source holds ``words``."""
    [cell] = [c for c in notebook.cells if c.cell_type == "code" and words in c.source]
    return cell.outputs


def html(notebook, words):
    return "".join(o.data.get("text/html", "") for o in outputs(notebook, words) if "data" in o)


def test_nothing_complains(executed):
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def test_the_progress_bar_is_a_widget_and_ends_full(executed):
    bars = [
        output.data
        for output in outputs(executed, "daskshare.detect(")
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    ]
    assert len(bars) == 1
    states = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    values = [
        (s["state"]["value"], s["state"]["max"])
        for s in states.values()
        if s["model_name"] == "FloatProgressModel"
    ]
    assert values == [(LAST - FIRST, LAST - FIRST)]


def test_model_summary_and_detections_are_tables(executed):
    assert "person, car, bus, truck" in html(executed, "yolo = daskshare.yolov3")
    assert f"{LAST - FIRST} frames of 1 video" in html(executed, "daskshare.detect(")
    assert ">confidence</th>" in html(executed, "client.submit(detect_frame")


def test_statistics_are_a_table(executed):
    text = html(executed, "daskshare.stats(client)")
    assert "daskshare on 1 worker" in text
    assert "yolov3-tiny" in text


def test_counts_and_annotated_frames_are_pictures(executed):
    for words in ("in_view.plot", "write_contact_sheet("):
        [picture] = [o.data["image/png"] for o in outputs(executed, words) if "data" in o]
        assert len(picture) > 5000
