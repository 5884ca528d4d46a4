"""`make trt-proof`: its commands are taken as they stand, and what they write becomes one file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rsd_trt.cli import main

ROOT = Path(__file__).parents[1]
# In rsd-trt's place: notes how it was called, and writes what the command would.
DOUBLE = """#!/bin/sh
echo "$@" >> calls
case $1 in
profile) echo '{"command": "profile"}' > results/tensorrt/profile.json ;;
*) echo "{\\"command\\": \\"$1\\"}" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_one_command_writes_one_file(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    for name, text in (("rsd-trt", DOUBLE), ("pip", '#!/bin/sh\necho pip "$@" >> calls\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    subprocess.run(["make", "trt-proof"], cwd=tmp_path, check=True, capture_output=True)
    proof = json.loads((tmp_path / "results/tensorrt/proof.json").read_text())
    assert proof == {name: {"command": name} for name in ("export", "verify", "profile")}
    install, *calls = (tmp_path / "calls").read_text().splitlines()
    assert ".[trt]" in install
    assert [call.split()[0] for call in calls] == ["export", "verify", "profile"]
    for call in calls:
        name, *arguments = call.split()
        main.commands[name].make_context(name, arguments)
