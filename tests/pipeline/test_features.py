"""What lies behind a teacher's answers, kept and read back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from potstill.errors import RecipeError, StoreError
from potstill.pipeline.features import FeatureReader, capture_features, features_of
from potstill.pipeline.run import explain_run, run_recipe
from potstill.pipeline.stopping import Stopping
from potstill.recipes import load_recipe
from potstill.signals import Stamp, open_store
from potstill.types import AttentionVectors, Signal, Wants

LOSSES = [
    {"kind": "forward_kl"},
    {"kind": "hidden_mse", "layers": {1: 2}},
    {"kind": "minilm_v2", "layers": "last", "relation_heads": 2},
    {"kind": "vector_cosine"},
    {"kind": "rkd_distance", "over": "texts"},
]
CLASSES = ("counting", "finding", "painting")


@pytest.fixture
def teacher(make_encoder):
    return {"kind": "local", "model": str(make_encoder("classes", labels=CLASSES)), "dtype": "fp32"}


def first_losses(recipe) -> dict[str, float]:
    line = json.loads((recipe.folder / "train" / "metrics.jsonl").read_text().splitlines()[0])
    return {name: line[name] for name in ("forward_kl", "hidden_mse", "minilm_v2", "vector_cosine", "rkd_distance")}


def test_what_is_kept_teaches_as_the_teacher_beside_the_student_does(task, teacher):
    online = task(name="online", teacher=teacher, losses=LOSSES, signals={"kind": "online"})
    kept = task(name="kept", teacher=teacher, losses=LOSSES, signals={"kind": "dense", "features": True})
    for recipe in (online, kept):
        run_recipe(recipe, until="train")
    beside, stored = first_losses(online), first_losses(kept)
    for name, value in beside.items():
        assert stored[name] == pytest.approx(value, rel=0.02, abs=1e-4), name


def test_a_store_that_is_gone_is_filled_again(task, teacher):
    recipe = task(teacher=teacher, losses=LOSSES, signals={"kind": "dense", "features": True})
    run_recipe(recipe, until="capture")
    facts = json.loads((recipe.folder / "capture" / "manifest.json").read_text())["facts"]
    from shutil import rmtree

    rmtree(facts["features"])
    state = {status.stage: status for status in explain_run(recipe)}["capture"]
    assert state.state == "damaged"
    assert "gone" in state.why
    run_recipe(recipe, until="train")


def test_attention_maps_are_not_kept_and_the_error_says_so(task, teacher):
    recipe = task(teacher=teacher, losses=[{"kind": "attention_mse"}], signals={"kind": "dense", "features": True})
    with pytest.raises(RecipeError, match=r"losses\[0\]\.kind=attention_mse needs attention"):
        run_recipe(recipe, until="prepare")


class _Speaker:
    """Says random numbers that follow from the tokens."""

    def __init__(self, features) -> None:
        self.features, self.asked = features, 0

    def read(self, batch, wants):
        self.asked += len(batch)
        states = torch.nn.functional.one_hot(batch.ids_BT % 8, 8).float() + batch.positions_BT.unsqueeze(-1)
        heads = states.unflatten(-1, (2, 4)).transpose(1, 2)
        vectors = {block: AttentionVectors(heads, heads + 1, heads + 2) for block in wants.vectors}
        return Signal(hidden={layer: states + layer for layer in wants.layers}, vectors=vectors)


class _Rows:
    """Texts of several lengths, as TextRows gives them."""

    def __init__(self, lengths) -> None:
        import numpy as np

        self.lengths = np.array(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, numbers):
        from potstill.types import Batch

        longest = max(int(self.lengths[n]) for n in numbers)
        ids_BT = torch.zeros(len(numbers), longest, dtype=torch.long)
        segments_BT = torch.zeros_like(ids_BT)
        for row, number in enumerate(numbers):
            length = int(self.lengths[number])
            ids_BT[row, :length] = torch.arange(length) * (number + 1) + number
            segments_BT[row, :length] = 1
        return Batch(ids_BT, torch.full_like(ids_BT, -100), segments_BT, tuple((str(n),) for n in numbers))


def test_each_text_is_asked_once_and_read_back_in_any_batch(tmp_path):
    config = SimpleNamespace(num_hidden_layers=3, hidden_size=8, num_attention_heads=2)
    config.get_text_config = lambda: config
    features = features_of(config, Wants(layers=(1,), vectors=(2,), pooled=True))
    assert features.layers == (1, 3)
    store = open_store(tmp_path / "store", Stamp("t", "v", "s"), 2 * features.numbers)
    rows, speaker = _Rows([3, 7, 7, 2, 5]), _Speaker(features)
    meter = SimpleNamespace(advance=lambda _: None)
    for _ in range(2):
        keys = capture_features(
            features, store, speaker, rows, salt=b"x", batch_tokens=14, meter=meter, stopping=Stopping()
        )
    assert speaker.asked == len(set(keys)) == 5
    reader = FeatureReader(SimpleNamespace(read=lambda *_: Signal()), store, features, salt=b"x", pools=True)
    batch = rows.batch([4, 0, 2])
    said, own = reader.read(batch, Wants(layers=(1,), vectors=(2,), pooled=True)), speaker.read(batch, features.wants)
    attended_BT = batch.segments_BT > 0
    assert_close(said.hidden[1][attended_BT].float(), own.hidden[1][attended_BT])
    assert_close(
        said.vectors[2].keys_BGTE.transpose(1, 2)[attended_BT].float(),
        own.vectors[2].keys_BGTE.transpose(1, 2)[attended_BT],
    )
    assert_close(said.pooled_BD, own.hidden[3][:, 0])
    with pytest.raises(StoreError, match="lacks what lies behind"):
        FeatureReader(SimpleNamespace(read=lambda *_: Signal()), store, features, salt=b"y", pools=True).read(
            batch, Wants(layers=(1,))
        )


def test_where_only_vectors_of_texts_are_compared_one_position_a_text_is_kept(tmp_path):
    config = SimpleNamespace(num_hidden_layers=3, hidden_size=8, num_attention_heads=2)
    config.get_text_config = lambda: config
    features = features_of(config, Wants(pooled=True))
    store = open_store(tmp_path / "store", Stamp("t", "v", "s"), 2 * features.numbers)
    rows, speaker = _Rows([3, 7, 7, 2, 5]), _Speaker(features)
    meter = SimpleNamespace(advance=lambda _: None)
    capture_features(features, store, speaker, rows, salt=b"x", batch_tokens=14, meter=meter, stopping=Stopping())
    assert store.num_records == 5
    reader = FeatureReader(SimpleNamespace(read=lambda *_: Signal()), store, features, salt=b"x", pools=True)
    batch = rows.batch([4, 0, 2])
    said, own = reader.read(batch, Wants(pooled=True)), speaker.read(batch, features.wants)
    assert_close(said.pooled_BD, own.hidden[3][:, 0])


def test_the_key_is_in_the_recipe():
    recipe = load_recipe("intent-sample", ["signals.features=true"])
    assert recipe.signals.features
