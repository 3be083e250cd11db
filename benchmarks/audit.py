"""How often the audit cries wolf, and what it finds: `python -m benchmarks.audit` (`make bench-audit`).

Sound caches of every sampler, written by float32 and bfloat16 teachers in other batch shapes and with other attention than the
audit's, must pass; planted faults must be found. The teachers' rows are recomputed once (`audit_scenes`); a trial draws a
cache's rows from those logits, plants a fault (`audit_faults`) and runs the tests of `stillroom audit` on 4,096 of them. What
is finished is kept in runs/audit-study, and a study that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.audit_faults import Case, cases, from_logits
from benchmarks.audit_scenes import Scene, documents_scene, plain_scene, wide_scene
from benchmarks.report import figures_of, render, save, table
from stillroom.storage.spec import SamplerKind

TITLE: Final = "Power of the audit"
RATE: Final = 1e-4
SWEEP: Final = (1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 3e-8, 1e-8)
SAMPLERS: Final[tuple[SamplerKind, ...]] = ("threshold", "random", "systematic", "stratified", "top_k", "top_p")
KEPT: Final = Path("runs/audit-study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audits", type=int, default=200, help="sound caches")
    parser.add_argument("--trials", type=int, default=100, help="of each fault")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--only", help="faults whose name holds this; prints, keeps nothing")
    parser.add_argument("--again", action="store_true", help="forget what an earlier study kept")
    parser.add_argument("--render", action="store_true", help="write the page again from kept figures")
    given = parser.parse_args()
    if given.render:
        render("audit", TITLE, page(figures_of("audit")))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.only:
        chosen = [case for case in cases(RATE) if given.only in case.name]
        stage = Study(given.audits, given.trials, None)
        for case in chosen:
            print(stage.fault(case))
        return
    if given.again:
        shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    figures = Study(given.audits, given.trials, KEPT).run()
    save("audit", TITLE, "make bench-audit", figures, page(figures))


class Study:
    """The study; scenes are made when they are first asked for."""

    def __init__(self, audits: int, trials: int, kept: Path | None) -> None:
        self.audits, self.trials, self.kept = audits, trials, kept
        self._scenes: dict[str, Scene] = {}

    def run(self) -> dict[str, Any]:
        """Everything, or what an earlier study has not kept."""
        start_s = time.monotonic()
        sound = self._once(f"sound-{self.audits}", self.sound)
        faults = [
            self._once(f"fault-{self.trials}-{case.name}", lambda case=case: self.fault(case)) for case in cases(RATE)
        ]
        drifts = self._once(f"drifts-{self.trials}", self.drifts)
        demo = self._once("demo", demo_cache)
        return {
            "rows": 4096, "audits": self.audits, "trials": self.trials, "threads": torch.get_num_threads(),
            "sound": sound, "faults": faults, "drifts": drifts, "demo": demo, "seconds": time.monotonic() - start_s,
        }  # fmt: skip

    def scene(self, name: str) -> Scene:
        """One of the scenes; the wide one is large, and goes when another is asked for."""
        if name not in self._scenes:
            start_s = time.monotonic()
            self._scenes.pop("wide", None)
            rates = (RATE, *SWEEP)
            makers: dict[str, Callable[[], Scene]] = {
                "float32": lambda: plain_scene("float32", rates),
                "bfloat16": lambda: plain_scene("bfloat16", rates),
                "documents": documents_scene,
                "wide": wide_scene,
            }
            self._scenes[name] = makers[name]()
            print(f"teacher of scene {name} recomputed in {time.monotonic() - start_s:.0f} s", flush=True)
        return self._scenes[name]

    def sound(self) -> dict[str, Any]:
        """Audits of sound caches, samplers, teachers and writers in turn."""
        alarms, smallest, by_kind = [], [], Counter[str]()
        ways = [
            (dtype, sampler, source)
            for dtype in ("float32", "bfloat16")
            for source in ("as audited", "batch of 3", "other attention")
            for sampler in SAMPLERS
        ]
        start_s, tests = time.monotonic(), 0
        for number in range(self.audits):
            dtype, sampler, source = ways[number % len(ways)]
            scene = self.scene(dtype)
            targets = scene.draw(sampler, 10_000 + number, source)
            judged = scene.judged(sampler, 10_000 + number, targets, replay=True)
            by_kind[f"{dtype}, {source}"] += 1
            tests = max(tests, len(judged))
            smallest.append(min(each.test.p / max(each.threshold, 1e-300) for each in judged))
            alarms += [(dtype, sampler, source, each.test.name, each.test.p) for each in judged if each.found]
            _say("sound", number + 1, self.audits, start_s, f"{len(alarms)} alarms")
        return {"audits": self.audits, "alarms": alarms, "by_kind": dict(by_kind), "tests": tests,
                "nearest": min(smallest), "seconds": time.monotonic() - start_s}  # fmt: skip

    def fault(self, case: Case, trials: int | None = None) -> dict[str, Any]:
        """Trials of one fault."""
        scene, trials = self.scene(case.scene), trials or self.trials
        start_s, found, alone, first = time.monotonic(), 0, 0, Counter[str]()
        every = Counter[str]()
        for trial in range(trials):
            targets = case.plant(scene, trial, np.random.default_rng(trial))
            judged = scene.judged(case.sampler, trial, targets, replay=case.replay)
            names = [each.test.name for each in judged if each.found]
            found += bool(names)
            alone += any(each.found for each in scene.judged_alone(case.sampler, targets))
            first.update(name.split("[")[0] for name in names[:1])
            every.update({name.split("[")[0] for name in names})
            _say(case.name, trial + 1, trials, start_s, f"{found} found")
        return {"name": case.name, "asked": case.asked, "scene": case.scene, "trials": trials, "found": found, "alone": alone,
                "first": dict(first.most_common(4)), "by": dict(every), "seconds": time.monotonic() - start_s}  # fmt: skip

    def drifts(self) -> list[dict[str, Any]]:
        """Ever smaller steps of the optimiser, a fifth of the trials each."""
        result = []
        for dtype in ("float32", "bfloat16"):
            scene = self.scene(dtype)
            for rate in (RATE, *SWEEP):
                source = f"step {rate:g}"
                case = Case(f"{dtype}: {source}", dtype, "threshold", from_logits(source), asked=False)
                gap_N = (
                    scene.written[source].double().log_softmax(-1) - scene.plain_NV.double().log_softmax(-1)
                ).gather(1, torch.from_numpy(scene.rows.labels_N)[:, None])
                outcome = self.fault(case, max(1, self.trials // 5))
                result.append({"dtype": dtype, "rate": rate, "mean_nats": float(gap_N.abs().mean()), **outcome})
        return result

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What an earlier study kept, or else made and kept now."""
        if self.kept is None:
            return make()
        file = self.kept / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"
        if not file.is_file():
            made = make()
            part = file.with_suffix(".part")
            part.write_text(json.dumps(made))
            part.replace(file)
        return json.loads(file.read_text())


def demo_cache() -> dict[str, Any]:
    """4,096 rows of a cache of the demo's shape, audited through the door, everything included but the interpreter's start."""
    from stillroom.pipeline.audit.config import AuditConfig
    from stillroom.pipeline.audit.run import audit
    from stillroom.pipeline.config import CacheConfig
    from stillroom.pipeline.run import build_cache

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        teacher, text = _demo_teacher(folder)
        build_cache(CacheConfig(teacher=str(teacher), data=str(text), out=folder / "cache", seq_len=256, max_sequences=1024,
                                sequences_per_shard=512))  # fmt: skip
        result = audit(AuditConfig(cache=folder / "cache", out=folder / "report"))
        size = (folder / "report" / "audit.json").stat().st_size
    return {"seconds": result.seconds, "rows": result.rows, "sound": result.sound, "json_bytes": size}


def _demo_teacher(folder: Path) -> tuple[Path, Path]:
    """The demo's teacher (4 layers, width 256, V = 4,096), not trained, on the demo's text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from stillroom.demo import standard_library_text, teacher_config

    text, _ = standard_library_text(folder / "text")
    config = teacher_config(folder, text)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(config).save_pretrained(folder / "teacher")
    return folder / "teacher", text


def page(figures: dict[str, Any]) -> str:
    """The page's body."""
    sound, demo = figures["sound"], figures["demo"]
    faults = [
        (fault["name"], "yes" if fault["asked"] else "", f"{fault['found']} of {fault['trials']}", str(fault["alone"]),
         ", ".join(f"`{name}` {many}" for name, many in fault["first"].items()) or "nothing")
        for fault in figures["faults"]
    ]  # fmt: skip
    drifts = [
        (each["dtype"], f"{each['rate']:g}", f"{each['mean_nats']:.2g}", f"{each['found']} of {each['trials']}",
         ", ".join(f"`{name}`" for name in sorted(each["by"]) if name.startswith("drift")) or "nothing")
        for each in figures["drifts"]
    ]  # fmt: skip
    missed = [
        fault["name"] for fault in figures["faults"] if fault["asked"] and fault["found"] < 0.99 * fault["trials"]
    ]
    alarms = "none" if not sound["alarms"] else "; ".join(map(str, sound["alarms"]))
    kinds = ", ".join(f"{many} ({kind})" for kind, many in sound["by_kind"].items())
    verdict = "sound" if demo["sound"] else "NOT SOUND"
    samplers = ", ".join(SAMPLERS)
    return f"""\
Every number is of the tests `stillroom audit` runs, on {figures["rows"]:,} rows (64 sequences of 64 rows, 50 shards), with a
false-alarm rate of 0.001 for a whole audit. What is asked of it: no alarm in 200 sound caches, and each planted fault found in
99 of 100 trials. [docs/audit.md](../audit.md) says what the tests are.

## Sound caches

{sound["audits"]} audits of sound caches, samplers {samplers} in turn: {kinds}.
Alarms: **{alarms}**. The nearest to one had a chance {sound["nearest"]:.2g} times its threshold; up to {sound["tests"]}
tests an audit.
("Other attention": written with eager attention, audited with SDPA.)

## Planted faults

Missed among those asked for: **{", ".join(missed) or "none"}**. The last column is the test a reader of the report sees first;
symptoms (drift, bias) stand behind causes there. "Without a teacher": what `--no-teacher` finds in the same rows.

{table(("fault", "asked for", "found", "without a teacher", "first finding"), faults)}

Top-k poses in half of the sequences only; the wrapped ids are those of a teacher whose late ids are rare, on a quarter of the
rows. A bfloat16 teacher's own noise hides what is smaller than it: those rows are here to say what it hides.

## The smallest drift it sees

One step of AdamW at ever smaller learning rates; the third column is the mean change of a label's log-probability.

{table(("teacher", "learning rate", "nats", "found", "by"), drifts)}

## Time

{demo["rows"]:,} rows of a cache of the demo's shape: {demo["seconds"]:.1f} s (wanted: under 60), {verdict}, audit.json
{demo["json_bytes"]:,} bytes. The study took {figures["seconds"] / 60:.0f} minutes ({figures["threads"]} threads; what an earlier
run had finished is not in it).
"""


def _say(what: str, done: int, total: int, start_s: float, note: str) -> None:
    if done == total or done % 10 == 0:
        spent_s = time.monotonic() - start_s
        print(f"{what}: {done}/{total} ({spent_s / done:.2f} s each) {note}", flush=True)


if __name__ == "__main__":
    main()
