"""The peers' virtual environment: the versions of requirements-peers.txt, made once in bench/.venv-peers.

Refuses: potstill's own environment, whose packages the peers must not share or change.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["peer_python"]

HERE = Path(__file__).resolve().parent
FOLDER, REQUIREMENTS = HERE / ".venv-peers", HERE / "requirements-peers.txt"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def peer_python() -> Path:
    """The peers' interpreter; the environment is made when it is not there or its requirements have changed."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / "requirements-stamp"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {FOLDER} (some minutes, once)", file=sys.stderr)
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    _install_torch(python, wanted)
    _pip(python, "-r", str(REQUIREMENTS)).check_returncode()
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _install_torch(python: Path, wanted: str) -> None:
    """The CPU build where there is no NVIDIA driver, as scripts/setup.sh does; else the default build comes later."""
    found = re.search(r"^torch==(\S+)$", wanted, re.MULTILINE)
    if found is None or not sys.platform.startswith("linux") or shutil.which("nvidia-smi"):
        return
    build = f"torch=={found[1]}+cpu"
    if _pip(python, build, quiet=True).returncode:
        _pip(python, build, "--extra-index-url", CPU_BUILDS)


def _pip(python: Path, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[bytes]:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL if quiet else None)
