from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import RecipeError
from potstill.recipes import load
from potstill.recipes.load import (
    dump_recipe,
    fingerprint,
    load_recipe,
    recipe_schema,
    shipped_recipe,
    shipped_recipes,
)
from potstill.recipes.schema import ConstantSchedule, CosineSchedule, LayersStudent, Recipe, WSDSchedule

BASE = """\
name: toy
data: {source: words.jsonl}
teacher: {kind: local, model: big}
student: {kind: layers, count: 3}
losses: [{kind: forward_kl}, {kind: cross_entropy}]
training: {steps: 3}
"""


def read(tmp_path: Path, text: str | bytes = BASE, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def refusal(tmp_path: Path, text: str | bytes = BASE, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


# --- YAML 1.2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e-3", 1.5e-3), (".5", 0.5), ("0.001", 1e-3), ("2", 2.0), ("0x10", 16.0)],
)
def test_numbers_are_read_as_yaml_1_2_writes_them(tmp_path: Path, written: str, number: float) -> None:
    assert read(tmp_path, BASE, f"training.learning_rate={written}").training.learning_rate == number
    text = BASE.replace("{steps: 3}", f"{{steps: 3, learning_rate: {written}}}")
    assert read(tmp_path, text).training.learning_rate == number


def test_a_large_float_is_a_number_of_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, BASE.replace("steps: 3", "tokens: 3e12")).training.tokens == 3e12


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "n", "2024-01-01", "1:30", "1e", "_1", "~a", "0o8"])
def test_words_stay_words(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, BASE + f"description: {word}\n").description == word
    assert read(tmp_path, BASE, f"description={word}").description == word


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode()) == read(tmp_path)


def test_anchors_and_merge_keys_are_plain_sharing(tmp_path: Path) -> None:
    shared = BASE.replace(
        "losses: [{kind: forward_kl}", "losses: [&a {kind: forward_kl, weight: 3}, {<<: *a, kind: reverse_kl}"
    )
    recipe = read(tmp_path, shared, "losses[0].weight=5")
    assert [term.weight for term in recipe.losses] == [5.0, 3.0, 1.0]


HOSTILE = {
    "": "r.yaml: the recipe is empty. Start from one of `potstill recipes list`.",
    "# only a remark\n": "r.yaml: the recipe is empty. Start from one of `potstill recipes list`.",
    "words": "r.yaml: got 'words', needs a mapping of keys such as name, data, teacher, student.",
    "[1, 2]": "r.yaml: got a list of 2, needs a mapping of keys such as name, data, teacher, student.",
    "a: 1\nb:\n  c: 1\n  c: 2\n": "r.yaml:4:3: key 'c' is there twice. Keep one of them.",
    '{1: 2, "1": 3}': "r.yaml:1:8: key '1' is there twice. Keep one of them.",
    "a: [": "r.yaml:1:5: expected the node content, but found '<stream end>'. Correct the YAML there.",
    "a:\n\t- b": r"r.yaml:2:1: found character '\t' that cannot start any token. Correct the YAML there.",
    "a: b: c": "r.yaml:1:5: mapping values are not allowed here. Correct the YAML there.",
    "a: 'b": "r.yaml:1:6: found unexpected end of stream. Correct the YAML there.",
    "a: *b": "r.yaml:1:4: found undefined alias 'b'. Correct the YAML there.",
    "--- a\n--- b": (
        "r.yaml:2:1: expected a single document in the stream but found another document. Correct the YAML there."
    ),
    "a: 1\nb: \x01": "r.yaml:2:4: character U+0001 is not allowed. Remove it.",
    "[" * 2000: "r.yaml: nested too deep for a recipe. Remove the surplus brackets.",
    "a: &a [*a]": "r.yaml:1:4: it contains itself through its alias. Write the value out.",
    "? [a]\n: b": "r.yaml:1:3: a key must be a word or a whole number. Quote it, or correct it.",
    "~: b": "r.yaml:1:1: a key must be a word or a whole number. Quote it, or correct it.",
    "1.5: b": "r.yaml:1:1: a key must be a word or a whole number. Quote it, or correct it.",
    "a: !!python/object/apply:os.system [ls]": (
        "r.yaml:1:4: tag '!!python/object/apply:os.system' has no place in a recipe. Remove it."
    ),
    "a: !!set {b}": "r.yaml:1:4: tag '!!set' has no place in a recipe. Remove it.",
    "a: !!binary aGk=": "r.yaml:1:4: tag '!!binary' has no place in a recipe. Remove it.",
    "a: !mine b": "r.yaml:1:4: tag '!mine' has no place in a recipe. Remove it.",
    "a: !!int b": "r.yaml: a tag such as !!int stands before a value that is none. Remove it.",
    "a: !!bool maybe": "r.yaml: a tag such as !!int stands before a value that is none. Remove it.",
    "a: " + "9" * 5000: "r.yaml:1:4: a whole number of 5000 digits. Give a smaller one.",
    'a: "\\ud800"': "r.yaml:1:4: the text holds a character that no file can. Remove the NUL or surrogate escape.",
    'a: "\\0"': "r.yaml:1:4: the text holds a character that no file can. Remove the NUL or surrogate escape.",
    "x" * 300_000: "r.yaml: more than 262144 bytes, which no recipe needs. Give a recipe, not data.",
}


@pytest.mark.parametrize("text", HOSTILE, ids=[repr(text[:20]) for text in HOSTILE])
def test_what_is_no_recipe_is_refused_in_one_line_with_its_place(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == HOSTILE[text]


def test_a_bomb_of_aliases_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    lines = ["a: &a [1,1,1,1,1,1,1,1,1]"]
    lines += [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    began_s = time.monotonic()
    assert refusal(tmp_path, "\n".join(lines)) == (
        "r.yaml:5:4: its aliases unfold to more than 20000 values. Write the recipe out."
    )
    assert time.monotonic() - began_s < 2


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"name: a\ndata: \xff\xfe") == (
        "r.yaml:2: byte 14 is not UTF-8. Save the recipe as UTF-8 text."
    )


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path, f"{tmp_path}: is a folder. Give the recipe's file, for example {tmp_path}/recipe.yaml."),
        (Path("a\0b"), r"'a\x00b': cannot be read (embedded null byte). Give a readable recipe file."),
        (Path("x" * 5000), "'" + "x" * 59 + "...: cannot be read (File name too long). Give a readable recipe file."),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == words


@settings(max_examples=150, deadline=None)
@given(st.text("abn:-[]{}&*!|>'\"%@#,? \n\t0e1.~<", max_size=30) | st.binary(max_size=30))
def test_any_bytes_are_a_recipe_or_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.mktemp("recipes") / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError):
        load_recipe(path)


# --- --set ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["losses.1.weight", "losses[1].weight"])
def test_set_reaches_into_lists(tmp_path: Path, key: str) -> None:
    assert [term.weight for term in read(tmp_path, BASE, f"{key}=2").losses] == [1.0, 2.0]


def test_set_makes_absent_mappings_of_the_default_kind(tmp_path: Path) -> None:
    recipe = read(tmp_path, BASE, "training.schedule.final=0.3", "data.splits.test=0.1", "report.title=A b")
    assert recipe.training.schedule == CosineSchedule(kind="cosine", final=0.3)
    assert recipe.data.splits.test == 0.1
    assert recipe.report.title == "A b"
    assert read(tmp_path, BASE + "report:\n", "report.title=x").report.title == "x"


def test_set_values_are_yaml_and_later_ones_win(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        BASE,
        "training.schedule={kind: constant, warmup: 1e-1}",
        "training.schedule.warmup=0.2",
        "student.keep=[0, 2]",
        "student.count=",
        "run_dir='a: b #c'",
        "description=a=b",
        'name="007"',
    )
    assert recipe.training.schedule == ConstantSchedule(kind="constant", warmup=0.2)
    assert recipe.student == LayersStudent(kind="layers", keep=[0, 2])
    assert recipe.folder == Path("a: b #c")
    assert (recipe.description, recipe.name) == ("a=b", "007")


def test_set_reaches_into_phases(tmp_path: Path) -> None:
    text = BASE + "phases: [{name: general, training: {steps: 9}}, {name: task}]\n"
    changes = ["phases[0].training.steps=3", "phases.1.losses=[{kind: reverse_kl}]", "phases[1].losses[0].weight=2"]
    first, second = read(tmp_path, text, *changes).phases
    assert first.training is not None
    assert first.training.steps == 3
    assert second.losses is not None
    assert [(term.kind, term.weight) for term in second.losses] == [("reverse_kl", 2.0)]
    assert refusal(tmp_path, text, "phases[0].training.stepz=3").startswith("phases[0].training.stepz: unknown key.")
    assert refusal(tmp_path, text, "phases[2].training.steps=3") == (
        "--set phases[2].training.steps=3: phases has entries 0 to 1, so it has no 2. Give the key of a value that the "
        "recipe can hold."
    )


@pytest.mark.parametrize("key", ["1", '"1"'])
def test_set_finds_the_whole_numbers_of_a_layer_map(tmp_path: Path, key: str) -> None:
    text = BASE.replace("cross_entropy", f"hidden_mse, layers: {{{key}: 2, 3: 4}}")
    assert read(tmp_path, text, "losses[1].layers.1=9").losses[1].layers == {1: 9, 3: 4}


SET_REFUSALS = {
    "trainning.steps=3": "trainning: unknown key. Did you mean training?",
    "training.stepz=3": "training.stepz: unknown key. Did you mean steps?",
    "losses[0].wieght=3": "losses[0].wieght: unknown key. Did you mean weight?",
    "losses.7.weight=2": (
        "--set losses.7.weight=2: losses has entries 0 to 1, so it has no 7. "
        "Give the key of a value that the recipe can hold."
    ),
    "losses.x=1": (
        "--set losses.x=1: losses has entries 0 to 1, so it has no x. Give the key of a value that the recipe can hold."
    ),
    "name.x=3": "--set name.x=3: name is 'toy', so it has no x. Give the key of a value that the recipe can hold.",
    "data.source=[": (
        "--set data.source=[:1:2: expected the node content, but found '<stream end>'. Correct the YAML there."
    ),
    **{
        text: f"--set {text}: needs KEY=VALUE, for example training.steps=50 or losses[0].weight=2."
        for text in ("name", "=3", "a..b=1", ".a=1", "a.=1", "losses[x]=1", "a b=1", "")
    },
    **{
        text: f"--set {text}: the value is not one YAML value. Quote text with ': ' or '#', put lists in []."
        for text in ("description=issue #2", "description=#2", "description=a: b", "losses=- a", "name='a' #b")
    },
}


@pytest.mark.parametrize("override", SET_REFUSALS)
def test_set_refuses_what_it_cannot_place(tmp_path: Path, override: str) -> None:
    assert refusal(tmp_path, BASE, override) == SET_REFUSALS[override]


# --- dump, fingerprint, schema ----------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40) | st.sampled_from(
    [
        "yes",
        "null",
        "~",
        "1e-4",
        "2024-01-01",
        "0x1",
        "- a",
        "a: b",
        " a ",
        "a\n",
        "\n",
        "#",
        "'",
        '"',
        "|",
        "a  b\n c",
        "a\tb " * 50,
        "\x85",
        "a\u2028é",
        "\ufeffa",
        "日本",
        "long words " * 50,
    ]
)
COUNTS = st.integers(1, 10**12)
POSITIVES = st.floats(1e-300, 1e300)
FRACTIONS = st.floats(0, 1, exclude_max=True)


def some(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional=fields)


def part(kind: str, **fields: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return some(**fields).map(lambda given: {"kind": kind, **given})


RAMPS = st.one_of(
    st.builds(
        lambda kind, ends: {"kind": kind, **ends},
        st.sampled_from(["linear", "cosine"]),
        st.fixed_dictionaries({"start": POSITIVES, "end": POSITIVES}),
    ),
    st.builds(lambda value: {"kind": "constant", "value": value}, POSITIVES),
)
LAYERS = st.sampled_from(["even", "last"]) | st.dictionaries(
    st.integers(0, 40), st.integers(0, 40), min_size=1, max_size=4
)
TERMS = st.lists(
    st.one_of(
        part("forward_kl", weight=POSITIVES, temperature=POSITIVES, times_temperature_squared=st.booleans()),
        part("reverse_kl", weight=POSITIVES | RAMPS, temperature=RAMPS),
        part("skew_forward_kl", alpha=FRACTIONS),
        part("cross_entropy", weight=RAMPS, label_smoothing=FRACTIONS),
        part("hidden_mse", layers=LAYERS),
        part("hidden_cosine", layers=LAYERS),
        part("attention_kl", layers=LAYERS, heads=st.sampled_from(["matched", "averaged"])),
        part("minilm_v2", layers=LAYERS, relation_heads=COUNTS),
        part("linear_cka", over=st.just("texts")),
        part("rkd_angle", layers=LAYERS),
        part("vector_cosine", weight=POSITIVES),
    ),
    min_size=1,
    unique_by=lambda term: term["kind"],
)
STUDENTS = st.one_of(
    st.builds(lambda count: {"kind": "layers", "count": count}, COUNTS),
    st.builds(lambda keep: {"kind": "layers", "keep": sorted(keep)}, st.sets(st.integers(0, 99), min_size=1)),
    st.just({"kind": "layers", "keep": "even", "count": 6, "architecture": "distilbert"}),
    st.builds(lambda model: {"kind": "model", "model": model}, TEXTS),
    st.builds(lambda config: {"kind": "config", "config": config}, some(hidden_size=COUNTS)),
)
SCHEDULES = st.one_of(
    part("cosine", warmup=FRACTIONS, final=FRACTIONS),
    part("constant", warmup=FRACTIONS),
    part("linear", warmup=FRACTIONS, final=FRACTIONS),
    st.just({"kind": "wsd"}),
)
TRAININGS = st.builds(
    lambda length, rest: {**length, **rest},
    st.sampled_from([{"steps": 3}, {"tokens": 3e12}, {"epochs": 0.5}]),
    some(learning_rate=POSITIVES, betas=st.tuples(FRACTIONS, FRACTIONS), clip_norm=st.none(), schedule=SCHEDULES),
)
LABELS = st.none() | st.lists(TEXTS, min_size=2, max_size=4)
OVERLONG = st.sampled_from(["truncate", "drop", "refuse"])
POOLING = st.sampled_from(["cls", "mean"])
TASKS = st.one_of(
    part("language_model"),
    part("masked_lm", masked=st.floats(1e-6, 0.99), by_mask=st.floats(0.0, 0.9)),
    part("classification", multi_label=st.booleans(), labels=LABELS, out_of_scope=TEXTS, pooling=POOLING),
    part("token_classification", labels=LABELS, overlong=OVERLONG),
    part("embedding", pooling=POOLING, normalise=st.booleans(), overlong=OVERLONG),
)
TEACHERS = st.one_of(
    st.builds(lambda model: {"kind": "local", "model": model}, TEXTS),
    st.builds(
        lambda model, training, learns: {"kind": "finetune", "model": model, "training": training, "learns": learns},
        TEXTS,
        TRAININGS,
        st.sampled_from(["all", "head"]),
    ),
    st.builds(
        lambda path, column, by: {"kind": "recorded", "path": path, column: "answer", "match": by},
        TEXTS,
        st.sampled_from(["label", "probabilities"]),
        st.sampled_from(["text", "id"]),
    ),
    st.builds(
        lambda model, sources: {"kind": "mixture", "members": [{"model": model}, {"model": "b", "sources": sources}]},
        TEXTS,
        st.dictionaries(TEXTS, st.floats(0, 9), max_size=3),
    ),
    st.builds(
        lambda model, host, rest: {"kind": "openai", "model": model, "base_url": f"http://{host}", **rest},
        TEXTS,
        TEXTS,
        some(
            api_key=st.none() | TEXTS,
            budget=some(usd=st.floats(0.01, 9), requests=COUNTS, tokens=COUNTS),
            limits=some(concurrency=COUNTS, requests_per_minute=st.floats(0.1, 1e4)),
            price=st.fixed_dictionaries({"input_usd": st.floats(0, 9), "output_usd": st.floats(0, 9)}),
            permission=TEXTS,
        ),
    ),
)
DATA = st.builds(
    lambda source, rest: {"source": source, **rest},
    TEXTS.filter(bool),
    some(
        label=TEXTS,
        text_pair=TEXTS,
        split_by=TEXTS,
        slice=TEXTS,
        unlabelled=TEXTS,
        labels_per_class=COUNTS,
        noise=some(copies=COUNTS, share=st.floats(1e-6, 0.99)),
    ),
)
EVALUATIONS = some(
    max_documents=COUNTS,
    calibrate=st.booleans(),
    precision=st.floats(0.01, 0.99),
    price=st.fixed_dictionaries({"machine_usd_per_hour": POSITIVES}, optional={"teacher_usd_per_1000": POSITIVES}),
)
PHASES = st.lists(
    st.fixed_dictionaries(
        {"name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")},
        optional={
            "task": TASKS,
            "data": DATA,
            "teacher": TEACHERS,
            "losses": TERMS,
            "signals": st.sampled_from([{"kind": "online"}, {"kind": "dense"}, {"kind": "topk", "k": 3}]),
            "training": TRAININGS,
            "control": some(enabled=st.booleans()),
            "evaluation": EVALUATIONS,
        },
    ),
    max_size=3,
    unique_by=lambda phase: phase["name"],
)
RECIPES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"),
        "data": DATA,
        "teacher": TEACHERS,
        "student": STUDENTS,
        "losses": TERMS,
        "training": TRAININGS,
    },
    optional={
        "description": TEXTS,
        "seed": st.integers(0, 2**32 - 1),
        "run_dir": TEXTS,
        "task": TASKS,
        "static": st.builds(lambda training: {"training": training, "dimensions": 8}, TRAININGS),
        "phases": PHASES,
        "evaluation": EVALUATIONS,
        "report": some(title=TEXTS),
    },
).map(Recipe.model_validate)


@settings(max_examples=25, deadline=None)
@given(RECIPES)
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("recipes") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    back = load_recipe(path)
    assert back == recipe
    assert dump_recipe(back) == dump_recipe(recipe)
    assert fingerprint(back) == fingerprint(recipe)


def test_a_dump_names_every_setting_in_the_schemas_order(tmp_path: Path) -> None:
    text = dump_recipe(read(tmp_path))
    keys = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    assert keys == list(Recipe.model_fields)
    assert "  learning_rate: 0.0005\n" in text
    assert "  - 0.9\n" in text


def test_the_fingerprint_knows_content_and_nothing_else(tmp_path: Path) -> None:
    one, other = {"b": [1, 2], "a": {"x": None}}, {"a": {"x": None}, "b": (1, 2)}
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint({1: "a"}) == fingerprint({"1": "a"})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint("1") != fingerprint(1)
    recipe = read(tmp_path)
    assert fingerprint(recipe) == fingerprint(json.loads(recipe.model_dump_json()))
    assert fingerprint(recipe) != fingerprint(read(tmp_path, BASE, "seed=1"))
    assert len(fingerprint(recipe)) == 32


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), [b"x"]])
def test_what_json_cannot_hold_has_no_fingerprint(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint(value)


CHILD = """
import sys
from potstill.recipes import fingerprint, load_recipe
print(fingerprint(load_recipe(sys.argv[1])), "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_another_process_finds_the_same_fingerprint_and_imports_no_torch(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "r.yaml"],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [fingerprint(recipe), "False", "False"]


def test_the_json_schema_is_plain_json_and_knows_every_key() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "potstill recipe"
    assert list(schema["properties"]) == list(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert "A file" in schema["$defs"]["Data"]["properties"]["source"]["description"]
    assert {"ForwardKL", "LayersStudent", "WSDSchedule"} <= schema["$defs"].keys()
    assert WSDSchedule.model_fields.keys() == schema["$defs"]["WSDSchedule"]["properties"].keys()


# --- shipped recipes --------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel's layout: `shipped` beside load.py, holding the one recipe `quickstart`."""
    folder = tmp_path / "wheel" / "shipped"
    folder.mkdir(parents=True)
    (folder / "quickstart.yaml").write_text(BASE)
    (folder / "notes.txt").write_text("")
    monkeypatch.setattr(load, "__file__", str(tmp_path / "wheel" / "load.py"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_shipped_recipes_are_found_by_name(shipped: Path) -> None:
    assert shipped_recipes() == {"quickstart": shipped / "quickstart.yaml"}
    assert shipped_recipe("quickstart") == shipped / "quickstart.yaml"
    assert load_recipe("quickstart", ["seed=4"]).seed == 4


def test_a_file_goes_before_a_shipped_recipe_of_the_same_name_and_a_folder_does_not(shipped: Path) -> None:
    Path("quickstart").mkdir()
    assert load_recipe("quickstart").name == "toy"
    Path("quickstart").rmdir()
    Path("quickstart").write_text(BASE.replace("toy", "mine"))
    assert load_recipe("quickstart").name == "mine"


def test_a_misspelt_recipe_is_answered_with_the_nearest(shipped: Path) -> None:
    for ask, words in (
        (lambda: shipped_recipe("quikstart"), "recipe: 'quikstart' is not shipped. Did you mean quickstart?"),
        (lambda: shipped_recipe("zzz"), "recipe: 'zzz' is not shipped. Shipped are: quickstart."),
        (lambda: load_recipe("quikstart"), "quikstart: there is no such file. Did you mean quickstart?"),
        (lambda: load_recipe("my/zzz.yaml"), "my/zzz.yaml: there is no such file. Shipped are: quickstart."),
    ):
        with pytest.raises(RecipeError) as caught:
            ask()
        assert str(caught.value) == words


def test_an_editable_install_finds_the_repositorys_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "news.yaml").write_text(BASE)
    monkeypatch.setattr(load, "__file__", str(tmp_path / "src" / "potstill" / "recipes" / "load.py"))
    assert shipped_recipes() == {"news": tmp_path / "recipes" / "news.yaml"}
