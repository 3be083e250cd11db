"""The sampler's kernels compile for a GPU, here, without one: what the interpreter cannot tell.

Run as a program this file compiles them for compute capability 9.0 and prints what the assembler says of each. That
takes a process of its own, for kernels decorated under TRITON_INTERPRET=1 never compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = {
    "logits": "*fp32", "top": "*fp32", "rate": "fp32", "stride_n": "i32", "stride_v": "i32", "vocabulary": "i32",
    "B": "i32", "start": "i32", "most": "i32", "seed_low": "i64", "seed_high": "i64",
}  # fmt: skip
SMALL = dict(BLOCK=512, WIDE=8, PADDED=256, DRAWS=4, TILE=4096)  # the tuning table's, up to 2**18 ids
LARGE = dict(BLOCK=4096, WIDE=1, PADDED=1024, DRAWS=1, TILE=4096)  # up to 2**22
KEYS = dict(BLOCK=128, WIDE=32, many="i32")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("maxima", SMALL),
    ("maxima", SMALL | dict(logits="*bf16")),
    ("sums", SMALL),
    ("sums", SMALL | dict(logits="*bf16")),
    ("sums", LARGE),
    ("heads", SMALL),
    ("heads", LARGE),
    ("locate", SMALL | dict(OWN=False, SPREAD=True, PUNCH=True)),  # threshold
    ("locate", LARGE | dict(OWN=False, SPREAD=True, PUNCH=True)),
    ("locate", SMALL | dict(OWN=True, SPREAD=False, PUNCH=False, least=None)),  # random
    ("locate", SMALL | dict(OWN=True, SPREAD=True, PUNCH=False, least=None)),  # stratified
    ("block_keys", KEYS),
    ("window_keys", KEYS),
    ("sums", SMALL | dict(fused=True)),  # what must not happen, to see that it would be seen
]


def compile_all() -> None:
    """One line of JSON for each case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stillroom.kernels.sample import kernels_triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name, values in CASES:
        kernel = getattr(kernels_triton, name)
        types = {**ARGUMENTS, **{key: value for key, value in values.items() if isinstance(value, str)}}
        constants = {key: value for key, value in values.items() if key in kernel.arg_names and key not in types}
        constants |= {"stride_v": 1} | ({"STREAM": 0} if "STREAM" in kernel.arg_names else {})
        signature = {key: "constexpr" if key in constants else types.get(key, "*i64") for key in kernel.arg_names}
        places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=places),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 8, "enable_fp_fusion": values.get("fused", False)},
        )
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            usage, code = (
                subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout
                for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        figures = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        print(json.dumps([name, figures, sorted(set(re.findall(r"\bFFMA\S*", code)))]))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's assembler is a Linux program")
def test_kernels_compile_without_fused_multiply_add_and_without_spills(tmp_path: Path) -> None:
    """A fused multiply-add rounds once where the reference rounds twice: other weights, other draws."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case[0] for case in cases] == [name for name, _ in CASES]
    *cases, (_, _, fused) = cases
    assert fused != []
    for name, figures, fused in cases:
        assert fused == [], name
        assert figures["stack"] == figures["local"] == 0, name
        assert 0 < figures["reg"] <= 168, name  # of 65,536 on a multiprocessor, for programs of 256 threads


if __name__ == "__main__":
    compile_all()
