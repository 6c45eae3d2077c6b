"""Make the virtual environment that the Makefile's targets run in.

Usage: ``python3 tools/make_venv.py FOLDER [--extras dev] [--gpu auto] [--torch-index URL]``

Needs nothing but Python. On a machine with a usable NVIDIA GPU it adds the ``gpu`` extra; on any
other Linux machine it takes torch's CPU build, because PyPI's build carries gigabytes of CUDA.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Before anything else in this file uses newer syntax at run time.
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(
        "daskshare needs Python 3.11, 3.12 or 3.13; {} is Python {}.{}. "
        "Name another one: make PYTHON=python3.12".format(sys.executable, *sys.version_info[:2])
    )

ROOT = Path(__file__).resolve().parents[1]

#: First driver series that runs CUDA 13.
MINIMUM_DRIVER = 580

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def driver_version() -> int | None:
    """Major version of the NVIDIA driver, or ``None`` when no GPU answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.match(r"\d+", done.stdout.strip())
    return int(found.group()) if done.returncode == 0 and found else None


def wants_gpu(choice: str, system: str, driver: int | None) -> bool:
    """Decide whether the GPU extra is installed; say so when a GPU is there and is left out.

    Parameters
    ----------
    choice : {"auto", "yes", "no"}
        What the user asked for.
    system : str
        ``sys.platform``.
    driver : int or None
        From :func:`driver_version`.
    """
    if choice != "auto":
        return choice == "yes"
    if driver is None or system != "linux":
        return False
    if driver < MINIMUM_DRIVER:
        say(
            f"the NVIDIA driver is {driver}; CUDA 13 needs {MINIMUM_DRIVER} or newer: installing "
            "for the CPU. README.md tells how to install for CUDA 12 by hand."
        )
        return False
    return True


def pinned_torch() -> str:
    """The version of torch in constraints/cpu.txt."""
    text = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8")
    found = re.search(r"^torch==(\S+)$", text, re.MULTILINE)
    if found is None:
        raise ValueError("constraints/cpu.txt holds no line torch==VERSION")
    return found.group(1)


def cpu_torch_commands(version: str, index: str) -> list[list[str]]:
    """Arguments of pip, in the order to try, that install torch's CPU build and nothing else."""
    wanted = ["install", "--quiet", "--no-deps", "--only-binary=:all:", f"torch=={version}+cpu"]
    # Where pip is set up with a mirror or a folder that has the build, nothing else is asked.
    return [wanted, [*wanted, "--index-url", index, "--retries", "1", "--timeout", "20"]]


def install_cpu_torch(pip: list[str], index: str) -> None:
    """Install torch's CPU build if it can be had, else leave it to the requirements."""
    version = pinned_torch()
    problem = ""
    for arguments in cpu_torch_commands(version, index):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        problem = done.stderr.strip()
    say(
        f"no CPU build of torch {version} from pip's own sources or {index} (set TORCH_INDEX); "
        "taking the default build, which on Linux downloads several GB of CUDA libraries. "
        f"pip said:\n{problem}"
    )


def make_venv(folder: Path) -> Path:
    """Create the environment and return its Python."""
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)
    if done.returncode != 0:
        sys.exit(
            f"{sys.executable} -m venv failed; on Debian and Ubuntu run: "
            "apt-get install python3-venv"
        )
    return folder / "bin" / "python"


def say(message: str) -> None:
    """Print a line that stands out between pip's."""
    print(f"make_venv: {message}", flush=True)


def main() -> None:
    """Make the environment, choose the builds, install daskshare in editable mode."""
    parser = argparse.ArgumentParser(description="Make the environment of the Makefile's targets.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", default="dev")
    parser.add_argument("--gpu", choices=["auto", "yes", "no"], default="auto")
    parser.add_argument("--torch-index", default=TORCH_INDEX)
    arguments = parser.parse_args()

    gpu = wants_gpu(arguments.gpu, sys.platform, driver_version())
    extras = f"{arguments.extras},gpu" if gpu else arguments.extras
    say(f"{arguments.folder} with {sys.executable}, extras {extras}; the first time takes minutes")
    pip = [str(make_venv(arguments.folder)), "-m", "pip", "--disable-pip-version-check"]
    if not gpu and sys.platform == "linux":
        install_cpu_torch(pip, arguments.torch_index)
    constraints = ROOT / "constraints" / ("gpu.txt" if gpu else "cpu.txt")
    target = f"{ROOT}[{extras}]"
    subprocess.run([*pip, "install", "--quiet", "-c", str(constraints), "-e", target], check=True)
    subprocess.run([*pip, "check"], check=True)
    # The Makefile compares this file's age, and reads from it whether to hide the GPUs.
    (arguments.folder / ".installed").write_text("gpu\n" if gpu else "cpu\n", encoding="utf-8")


if __name__ == "__main__":
    main()
