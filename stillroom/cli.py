"""The `stillroom` command: picks a verb, reads its settings, runs it, prints its summary.

Exit status: 0 done, 1 a finding, 2 usage or input (one sentence on standard error, no traceback); 130 Ctrl-C, 143 SIGTERM:
what was committed is kept, and the same command goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from stillroom.storage.errors import InputError, StillroomError

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


@dataclass(frozen=True, slots=True)
class Verb:
    """One command: where its settings and its body live (imported only when asked for), and its help."""

    settings: str
    body: str
    summary: str
    examples: str
    positional: str | tuple[str, ...] | None = None


VERBS = {
    "plan": Verb(
        "stillroom.pipeline.plan_config:PlanConfig",
        "stillroom.planning:plan",
        "Say what a run of `cache` will take before it is made: bytes, hours, price, gradient noise against N, top-k beside it.",
        "  stillroom plan --teacher Qwen/Qwen3-0.6B --data corpus.jsonl --workers 8 --gpu-hour-price 2.5\n"
        "  stillroom plan --teacher Qwen/Qwen3-0.6B --data corpus.jsonl --entries-per-row 12\n"
        "  stillroom plan --tokens 100000000000 --rows-per-s 20000 --bytes-per-row 32 --workers 64     no teacher is loaded",
    ),
    "cache": Verb(
        "stillroom.pipeline.config:CacheConfig",
        "stillroom.commands:cache",
        "Run the teacher once over a corpus and keep its distributions as sparse, unbiased samples.",
        "  stillroom cache --teacher Qwen/Qwen3-0.6B --data corpus.jsonl --out cache/\n"
        "  stillroom cache --config run.yaml --draws 25\n"
        "  stillroom cache --config run.yaml --engine local --workers 8\n"
        "  torchrun --nproc-per-node 8 -m stillroom cache --config run.yaml\n"
        "  torchrun --nproc-per-node 8 -m stillroom cache --config run.yaml --tensor-parallel 4\n"
        "  srun stillroom cache --config run.yaml                 the same in a SLURM array or a Kubernetes Indexed Job\n"
        "  stillroom cache --config run.yaml --engine ray         then `stillroom inspect cache/ --watch`",
        positional=None,
    ),
    "inspect": Verb(
        "stillroom.commands:InspectConfig",
        "stillroom.commands:inspect",
        "Say what made a cache, and what it holds: sequences, rows, entries, bytes by array, kept mass.",
        "  stillroom inspect cache/\n  stillroom inspect cache/ --json\n  stillroom inspect s3://bucket/cache --watch",
        positional="cache",
    ),
    "verify": Verb(
        "stillroom.shelf:VerifyConfig",
        "stillroom.shelf:verify",
        "Check a cache: records, files, sizes, rows; say which shards are damaged and what to do (status 1: findings).",
        "  stillroom verify cache/\n"
        "  stillroom verify cache/ --hashes\n"
        "  stillroom verify cache/ --sample 256\n"
        "  stillroom verify cache/ --hashes --repair     then `stillroom cache` again: only what was dropped is redone",
        positional="cache",
    ),
    "audit": Verb(
        "stillroom.pipeline.audit.config:AuditConfig",
        "stillroom.auditing:audit",
        "Prove what a cache is worth: recompute its teacher on some rows, test, measure (status 1: a finding).",
        "  stillroom audit cache/\n"
        "  stillroom audit cache/ --teacher Qwen/Qwen3-1.7B --rows 16384 --out report/\n"
        "  stillroom audit cache/ --no-teacher                    what the cache says about itself",
        positional="cache",
    ),
    "export": Verb(
        "stillroom.shelf:ExportConfig",
        "stillroom.shelf:export",
        "Write a cache as Parquet, Arrow or a `datasets` folder, one row per sequence, for other tools and hubs.",
        "  stillroom export cache/ --to parquet --out rows/       datasets.load_dataset('rows/')\n"
        "  stillroom export cache/ --to datasets --out rows/      datasets.load_from_disk('rows/')",
        positional="cache",
    ),
    "import": Verb(
        "stillroom.importing:ImportConfig",
        "stillroom.importing:import_",
        "Make a cache from an export, bit for bit the one it was, or from what other tools wrote; every value checked.",
        "  stillroom import rows/ --out cache/\n"
        "  stillroom import captured/ --from distillkit --tokenizer teacher/ --teacher mine --out cache/\n"
        "  stillroom import prepared/ --from axolotl --alignment next-token --tokenizer teacher/ --teacher mine --out cache/\n"
        "  stillroom import rows.parquet --from topk --tokens-column input_ids --ids-column ids --logprobs-column logprobs \\\n"
        "      --alignment this-token --tokenizer teacher/ --teacher mine --out cache/",
        positional="folder",
    ),
    "losses": Verb(
        "stillroom.measuring:LossesConfig",
        "stillroom.measuring:losses",
        "Measure another model's loss on each sequence of a cache, for difference sampling or domain weights in `train`.",
        "  stillroom losses cache/ --model small-reference/\n"
        "  stillroom losses cache/ --model student/ --sample 2000 --out student-losses.arrow",
        positional="cache",
    ),
    "train": Verb(
        "stillroom.train.config:TrainConfig",
        "stillroom.commands:train",
        "Train a student from a cache (or from a live teacher: the reference arm).",
        "  stillroom train --cache cache/ --student student-config/ --out student/\n"
        "  stillroom train --cache cache/ --student HuggingFaceTB/SmolLM2-135M --out student/ --alpha 0.1 --lr 3e-4\n"
        "  torchrun --nproc-per-node 8 -m stillroom train --cache cache/ --student config.json --out student/ --parallel fsdp",
    ),
    "evaluate": Verb(
        "stillroom.evaluating:EvaluateConfig",
        "stillroom.evaluating:evaluate",
        "Measure a student on held-out text: loss, KL to the teacher, agreement, calibration, acceptance; lm-eval tasks.",
        "  stillroom evaluate --student student/ --teacher teacher/ --data heldout.jsonl --seq-len 256\n"
        "  stillroom evaluate --student student/ --cache heldout-cache/ --views --frequency-cache cache/\n"
        "  stillroom evaluate --student student/ --tasks hellaswag,arc_easy --json",
    ),
    "compare": Verb(
        "stillroom.comparing.config:CompareConfig",
        "stillroom.comparing.run:compare",
        "Train and measure students that differ in one thing each, and write one table: arms and seeds from a file, resumable.",
        "  stillroom cp compare compare.yaml     the built-in one, to change\n"
        "  stillroom compare --config compare.yaml\n"
        "  stillroom compare --config compare.yaml --tokens 100000 --seeds 0 --train.lr 0.01 --out runs/quick",
    ),
    "ls": Verb(
        "stillroom.recipes:ListConfig",
        "stillroom.recipes:ls",
        "List the built-in recipes: settings files to copy and own.",
        "  stillroom ls",
    ),
    "cp": Verb(
        "stillroom.recipes:CopyConfig",
        "stillroom.recipes:cp",
        "Copy a built-in recipe to a file of yours.",
        "  stillroom cp compare compare.yaml",
        positional=("name", "file"),
    ),
    "demo": Verb(
        "stillroom.commands:DemoConfig",
        "stillroom.commands:demo",
        "The whole way on the sources of your own Python: teacher, cache, students, table (about 6 minutes on two cores).",
        "  stillroom demo\n  stillroom demo --out runs/demo --tokens 1200000",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():  # the hub library's bars are for terminals
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _dispatch(arguments)
    except StillroomError as error:
        print(f"stillroom: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"stillroom: the disk takes no more ({os.strerror(error.errno)}{where}); make room and run the same command again: "
            "what was committed is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        print(
            "stillroom: interrupted; what was committed is kept, run the same command again to go on", file=sys.stderr
        )
        return int(getattr(error, "status", 130))  # SIGTERM's is 143


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"stillroom {version('stillroom')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        from stillroom.settings import unknown

        raise InputError(unknown(name, list(VERBS), "command of stillroom"))
    from stillroom.settings import parse

    verb = VERBS[name]
    settings, as_json = parse(
        _load(verb.settings),
        rest,
        prog=f"stillroom {name}",
        summary=verb.summary,
        examples=verb.examples,
        positional=verb.positional,
    )
    body: Callable[[Any, bool], Any] = _load(verb.body)
    result = body(settings, as_json)
    if as_json and result is not None:
        plain = (
            dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
        )
        print(json.dumps(plain, default=str))
    return int(getattr(result, "exit_status", 0))


def _load(where: str) -> Any:
    module, name = where.split(":")
    return getattr(import_module(module), name)


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return (
        "usage: stillroom COMMAND [options]      distil language models from a shelf\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`stillroom COMMAND --help` lists the options of one, with examples."
    )
