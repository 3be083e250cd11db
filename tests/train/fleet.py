"""Runs of several processes, as torchrun starts them, without torchrun: the same variables, gloo on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAIN = """
import json, os, sys
import torch
torch.set_num_threads(1)
os.environ["TRITON_INTERPRET"] = "1"
from stillroom.cli import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def arguments(settings: dict[str, Any]) -> list[str]:
    """The command line of `stillroom train`."""
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if value is not None]
    return ["train", *(word for flag in flags for word in flag), "--json"]


def start(processes: int, settings: dict[str, Any], code: str = MAIN, **environ: str) -> list[subprocess.Popen[str]]:
    """The processes of one run."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1", **environ,
    }  # fmt: skip
    command = [sys.executable, "-c", code, json.dumps(arguments(settings))]
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(fleet: list[subprocess.Popen[str]], timeout_s: float = 400) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each; a process that hangs fails."""
    try:
        found = []
        for process in fleet:
            out, err = process.communicate(timeout=timeout_s)
            found.append((process.returncode, out, err))
        return found
    finally:
        for process in fleet:
            if process.poll() is None:
                process.kill()


def run(processes: int, settings: dict[str, Any], **more: Any) -> list[tuple[int, str, str]]:
    """Start and finish."""
    return finish(start(processes, settings, **more))


def signal_at(fleet: list[subprocess.Popen[str]], out: Path, step: int, number: int, only: int | None = None) -> None:
    """Send a signal to all processes, or one, once the log has reached a step."""
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            break
        if any(process.poll() is not None for process in fleet):
            raise AssertionError(f"ended early: {finish(fleet)}")
        time.sleep(0.05)
    for rank, process in enumerate(fleet):
        if only in (None, rank):
            process.send_signal(signal.Signals(number))
