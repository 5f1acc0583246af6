"""Where the kernel offers all that is needed, it takes the BPF programs: else what they answer would be skipped."""

from __future__ import annotations

import pytest
import rig

from fuseclient import features

PROGRAMS = "BPF programs"


def test_the_kernel_takes_the_programs() -> None:
    missing = features.missing_for_bpf(rig.probed())
    if lacking := [feature for feature in missing if feature.name != PROGRAMS]:
        pytest.skip(f"lacking: {features.describe(lacking)}")
    assert not missing, features.describe(missing)
