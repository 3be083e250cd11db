"""The power study in small: no alarm in sound caches of every sampler, every fault it is asked for found in every trial."""

from __future__ import annotations

import pytest

from benchmarks.audit import RATE, Study
from benchmarks.audit_faults import cases


@pytest.mark.slow
def test_the_power_study_in_small() -> None:
    study = Study(audits=36, trials=3, kept=None)  # 36: each sampler under each writer and teacher, once
    sound = study.sound()
    assert sound["alarms"] == []
    assert len(sound["by_kind"]) == 6
    for case in cases(RATE):
        if case.asked:
            outcome = study.fault(case)
            assert outcome["found"] == 3, outcome
