"""Makes the reference policy and its draft with eyes of its own from nothing: from collecting to files to take home.

    python -m examples.reference_policy.studies.own_eyes --work /tmp/eyes --out "$OUT" --minutes 9.5

Give the same command again until it says that all is done: each stage goes on where it was. `--minutes` is what this
command may take; --collect, --main and --draft are what each stage gets in all. `--smoke` does it in tiny, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.reference_policy.parts import split

log = logging.getLogger(__name__)

PACKAGE = "examples.reference_policy"
CHUNK = 16  # T
ROTATION = "robosuite"
SAY_EVERY = 60.0  # s
CLOSING = 20.0  # s that a training needs to save and end
# Stages, and the time (s) without which a command does not begin them.
LEAST = {"collect": 60.0, "codec": 20.0, "main": 60.0, "bundle": 45.0, "draft": 60.0, "report": 60.0, "parts": 15.0}


class OutOfTime(Exception):
    """The rest is for the next command."""


@dataclass(frozen=True)
class Plan:
    """What is made."""

    work: Path
    out: Path
    size: str
    device: str
    gpus: int
    workers: int
    renderers: int  # GPUs that render; 0: all
    episodes: int  # a task, at the most
    tasks: str
    every: int
    collect: float  # minutes
    main: Sequence[str]  # how long main is trained, and how
    draft: Sequence[str]

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def run(self) -> Path:
        return self.work / "run"

    @property
    def result(self) -> Path:
        return self.work / "result"


class Driver:
    """Runs the stages that are not done, within this command's time."""

    def __init__(self, plan: Plan, deadline: float) -> None:
        self.plan, self.deadline = plan, deadline
        self.started = time.time()
        plan.run.mkdir(parents=True, exist_ok=True)

    def go(self) -> None:
        """All stages in turn.

        Raises:
            OutOfTime: the rest is for the next command.
        """
        for stage in LEAST:
            mark = self.plan.work / f"{stage}.done"
            if mark.exists():
                continue
            if self.deadline - time.time() < LEAST[stage]:
                raise OutOfTime(stage)
            began = time.time()
            self.say(f"{stage} begins")
            getattr(self, f"do_{stage}")()
            mark.write_text(f"{time.time() - began:.1f} s\n")
            self.say(f"{stage} took {time.time() - began:.0f} s")

    def do_collect(self) -> None:
        plan = self.plan
        minutes = min(plan.collect, (self.deadline - time.time()) / 60 - 0.2)
        arguments = ["--out", plan.data, "--episodes", plan.episodes, "--tasks", plan.tasks, "--workers", plan.workers]
        arguments += ["--size", plan.size, "--renderers", plan.renderers]
        arguments += ["--every", plan.every, "--rotation", ROTATION, "--minutes", f"{minutes:.2f}"]
        self.launch("collect", f"{PACKAGE}.collect", arguments)
        manifest = json.loads((plan.data / "manifest.json").read_text("utf-8"))
        self.say("episodes: " + json.dumps(manifest["tasks"]))

    def do_codec(self) -> None:
        self.launch("codec", f"{PACKAGE}.train", ["codec", *self.common("cpu")])

    def do_main(self) -> None:
        self.train("main", f"{PACKAGE}.train", ["policy", *self.common(), *self.plan.main], "policy")

    def do_bundle(self) -> None:
        bundle = self.plan.result / "bundle"
        if bundle.exists():
            shutil.rmtree(bundle)
        self.launch("bundle", f"{PACKAGE}.train", ["save", *self.common(), "--bundle", bundle])

    def do_draft(self) -> None:
        self.train("draft", f"{PACKAGE}.fit_vision_draft", ["fit", *self.common(), *self.plan.draft], "vision_draft")

    def do_report(self) -> None:
        self.launch("report", f"{PACKAGE}.fit_vision_draft", ["report", *self.common(), *self.plan.draft])

    def do_parts(self) -> None:
        for name in ("training.json", "metrics.jsonl", "quantiles.json"):
            shutil.copy(self.plan.run / name, self.plan.result / name)
        for file in self.plan.run.glob("vision_draft*"):
            if file.suffix != ".pt":
                shutil.copy(file, self.plan.result / file.name)
        shutil.copy(self.plan.data / "manifest.json", self.plan.result / "collected.json")
        split(self.plan.result, self.plan.out)

    def common(self, device: str | None = None) -> list[object]:
        """Arguments of every training."""
        plan = self.plan
        found: list[object] = ["--data", plan.data, "--run", plan.run, "--size", plan.size]
        return [*found, "--chunk", CHUNK, "--rotation", ROTATION, "--device", device or plan.device]

    def train(self, stage: str, module: str, arguments: Sequence[object], loop: str) -> None:
        """A training on all GPUs, as far as the time goes."""
        self.launch(stage, module, arguments, processes=self.plan.gpus)
        checkpoint = torch.load(self.plan.run / f"{loop}.pt", map_location="cpu", weights_only=True)
        if checkpoint["progress"] < 1:
            raise OutOfTime(f"{stage}, at {checkpoint['progress']:.0%}")

    def launch(self, stage: str, module: str, arguments: Sequence[object], processes: int = 1) -> None:
        """Runs a module, in `processes` of them, and says once a minute how far it is."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        common = os.environ | {"TRAIN_UNTIL": str(self.deadline - CLOSING), "WORLD_SIZE": str(processes)}
        common |= {"RENDEZVOUS": str(self.plan.work / f"rendezvous_{uuid.uuid4().hex}")}
        logs = [self.plan.work / f"{stage}.{i}.log" for i in range(processes)]
        running = []
        for i, file in enumerate(logs):
            with file.open("a") as stream:
                environment = common | {"RANK": str(i)}
                running.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment))
        try:
            said = time.time()
            while any(process.poll() is None for process in running):
                time.sleep(0.2)
                broken = [i for i, process in enumerate(running) if process.poll()]
                if broken:
                    raise SystemExit(f"{stage} broke:\n" + "\n".join(_tail(logs[broken[0]], 25)))
                if time.time() - said > SAY_EVERY:
                    said = time.time()
                    self.say(f"{stage}: " + " ".join(_tail(logs[0], 1))[:400])
                if time.time() > self.deadline:
                    raise OutOfTime(f"{stage}, which did not end in time")
            if any(process.returncode for process in running):
                raise SystemExit(f"{stage} broke:\n" + "\n".join(_tail(logs[0], 25)))
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()

    def say(self, text: str) -> None:
        """One line, with the time since this command began."""
        log.info("%5.0f s  %s", time.time() - self.started, text)


def _tail(file: Path, lines: int) -> list[str]:
    return file.read_text("utf-8", errors="replace").splitlines()[-lines:]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.studies.own_eyes", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="what is kept between two commands")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts of the result")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this command (default %(default)s)")
    parser.add_argument("--collect", type=float, default=3.5, help="minutes (default %(default)s)")
    parser.add_argument("--main", type=float, default=8.0, help="minutes (default %(default)s)")
    parser.add_argument("--draft", type=float, default=4.5, help="minutes (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 4))
    parser.add_argument("--renderers", type=int, default=0, help="GPUs that render (default: all)")
    parser.add_argument("--episodes", type=int, default=400, help="a task, at the most (default %(default)s)")
    parser.add_argument("--every", type=int, default=2, help="record every n-th step (default %(default)s)")
    parser.add_argument("--main-lr", type=float, default=1.5e-3)
    parser.add_argument("--draft-lr", type=float, default=1.5e-3)
    parser.add_argument("--draft-config", default="{}", help='JSON, such as {"width": 256, "heads": 4}')
    parser.add_argument("--smoke", action="store_true", help="all of it in tiny, on the CPU")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    draft_config = ["--draft", args.draft_config]
    if args.smoke:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        main_part: list[str] = ["--steps", "6", "--batch", "16", "--no-compile"]
        draft_part = ["--steps", "6", "--batch", "16", "--no-compile", *draft_config]
        plan = Plan(
            args.work, args.out, "tiny", "cpu", args.gpus, 2, 0, 2, "0,1", 8, args.collect, main_part, draft_part
        )
    else:
        main_part = ["--minutes", str(args.main), "--lr", str(args.main_lr)]
        draft_part = ["--minutes", str(args.draft), "--lr", str(args.draft_lr), *draft_config]
        plan = Plan(
            args.work,
            args.out,
            "reference",
            "auto",
            args.gpus,
            args.workers,
            args.renderers,
            args.episodes,
            ",".join(map(str, range(10))),
            args.every,
            args.collect,
            main_part,
            draft_part,
        )
    driver = Driver(plan, time.time() + 60 * args.minutes)
    try:
        driver.go()
    except OutOfTime as rest:
        driver.say(f"the time is over before {rest} is done: give the same command again")
    else:
        driver.say(f"all is done: {', '.join(sorted(file.name for file in args.out.iterdir()))}")


if __name__ == "__main__":
    main()
