from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from potstill.errors import SampleError
from potstill.samples import list_samples, sample_info


@pytest.mark.parametrize("name", list_samples())
def test_every_sample_pins_a_hash_and_names_a_licence(name):
    sample = sample_info(name)
    assert re.fullmatch(r"[0-9a-f]{64}", sample.sha256)
    assert sample.licence
    assert sample.work_bytes > sample.wheel_bytes


def test_an_unknown_name_is_answered_with_the_nearest_one():
    with pytest.raises(SampleError, match=r"sample:smollm2: .* Did you mean sample:smollm2-135m-instruct\?"):
        sample_info("smollm2")


@pytest.mark.parametrize("change", [{"version": "9"}, {"sha256": "0" * 64}, {"revision": 9}, {"product": "x"}])
def test_whatever_decides_the_content_decides_the_folder(change):
    sample = sample_info("news-articles")
    assert replace(sample, **change).key != sample.key


def test_importing_the_room_does_not_import_torch():
    code = "import sys, potstill.samples; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
