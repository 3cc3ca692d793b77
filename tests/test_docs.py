"""The documents say what the code does: every recipe key with its default, examples that load, names that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from potstill.pipeline.chain import phases_of
from potstill.pipeline.objective import check_losses
from potstill.pipeline.suitability import check_task
from potstill.recipes import (
    cleaning,
    endpoints,
    generate,
    load_recipe,
    losses,
    schema,
    shipped_recipes,
    signals,
    students,
    tasks,
    teachers,
    training,
    verify,
)
from potstill.recipes.schema import RunTeacher

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def kind_of(model: type[BaseModel]) -> str:
    """The one kind of a model that belongs to a union, none for a model that such models share."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else ""


MODULES = (cleaning, endpoints, generate, losses, schema, signals, students, tasks, teachers, training, verify)
"""Of the schema: every model in them has a section."""

SECTIONS = {
    "Recipe": schema.Recipe,
    **{f"Task: {kind_of(model)}": model for model in get_args(get_args(tasks.Task)[0])},
    "Data": schema.Data,
    "Noise": schema.Noise,
    "Splits": schema.Splits,
    **{f"Teacher: {kind_of(model)}": model for model in get_args(get_args(teachers.Teacher)[0])},
    "Limits": endpoints.Limits,
    "Budget": endpoints.Budget,
    "Token price": endpoints.TokenPrice,
    "Labelling": endpoints.Labelling,
    "Member": teachers.Member,
    "Generate": generate.Generate,
    **{f"Prompts: {kind_of(model)}": model for model in get_args(get_args(generate.Prompts)[0])},
    "Writing": generate.Writing,
    "Keep": generate.Keep,
    **{f"Verifier: {kind_of(model)}": model for model in get_args(get_args(verify.Verifier)[0])},
    "Cleaning": cleaning.Cleaning,
    "Semantic": cleaning.Semantic,
    "Decontaminate": cleaning.Decontaminate,
    "Quality": cleaning.Quality,
    "Judge": cleaning.Judge,
    **{f"Student: {kind_of(model)}": model for model in get_args(get_args(students.Student)[0])},
    "Search": schema.Search,
    "Sizes": schema.CausalConfig,
    "Static": schema.StaticStudent,
    **{f"Loss: {kind_of(model)}": model for model in get_args(get_args(losses.LossTerm)[0])},
    **{f"Ramp: {kind_of(model)}": model for model in get_args(get_args(losses.Ramp)[0])},
    **{f"Signals: {kind_of(model)}": model for model in get_args(get_args(signals.Signals)[0])},
    **{f"Positions: {kind_of(model)}": model for model in get_args(get_args(signals.Positions)[0])},
    "Training": schema.Training,
    "LoRA": training.LowRank,
    **{f"Schedule: {kind_of(model)}": model for model in get_args(get_args(training.Schedule)[0])},
    "Checkpoints": training.Checkpoints,
    "Phase": schema.Phase,
    "Control": schema.Control,
    "Evaluation": schema.Evaluation,
    "Price": schema.Price,
    "Report": schema.Report,
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def sections(path: Path) -> dict[str, str]:
    """{second-level heading: text below it}."""
    parts = re.split(r"^## (.+)$", read(path), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def keys_of(text: str) -> dict[str, str]:
    """{key: default} of the rows of a section's table."""
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", text, flags=re.MULTILINE))


def yaml_blocks(path: Path) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", read(path), flags=re.DOTALL)


def source_files() -> list[str]:
    files = (ROOT / "src" / "potstill").rglob("*.py")
    return sorted(
        path.relative_to(ROOT / "src" / "potstill").as_posix() for path in files if path.name != "__init__.py"
    )


def test_every_model_of_the_schema_has_a_section():
    models = {
        model
        for module in MODULES
        for model in vars(module).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == module.__name__
    }
    public = {model for model in models if kind_of(model) or "kind" not in model.model_fields}
    public = {model for model in public if not model.__name__.startswith("_")}
    assert public == set(SECTIONS.values())


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_stands_in_its_section_with_its_default(heading):
    fields = SECTIONS[heading].model_fields
    documented = keys_of(sections(ROOT / "docs" / "recipes.md")[heading])
    assert set(documented) == set(fields)
    for key, field in fields.items():
        if field.is_required():
            assert documented[key] == "needed", key
        elif isinstance(field.default, BaseModel):
            assert documented[key] == "see below", key
        else:
            said = YAML(typ="safe").load(documented[key].strip("`"))
            assert (tuple(said) if isinstance(field.default, tuple) else said) == field.default, key


def whole_recipes() -> list[tuple[str, str]]:
    """(document, recipe) of every YAML block that is a recipe from its name on."""
    return [(path.name, block) for path in DOCUMENTS for block in yaml_blocks(path) if block.startswith("name:")]


@pytest.mark.parametrize(("document", "block"), whole_recipes())
def test_a_recipe_in_the_documents_loads_and_suits_its_task(tmp_path, monkeypatch, document, block):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    for one in (recipe, *phases_of(recipe)):
        if not isinstance(one.teacher, RunTeacher):  # the assistant's file is not there
            check_task(one)
        check_losses(one)


def test_the_documents_show_a_recipe_for_every_task_and_teacher(tmp_path):
    """A kind that nobody shows is one that everybody gets wrong."""
    shown = {(name, kind) for _, block in whole_recipes() for name, kind in _kinds(tmp_path, block)}
    assert shown >= {("task", kind_of(model)) for model in get_args(get_args(tasks.Task)[0])}
    assert shown >= {("teacher", kind_of(model)) for model in get_args(get_args(teachers.Teacher)[0])}


def _kinds(folder: Path, block: str) -> set[tuple[str, str]]:
    (folder / "recipe.yaml").write_text(block, encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml")
    return {(name, getattr(one, name).kind) for one in (recipe, *phases_of(recipe)) for name in ("task", "teacher")}


def test_the_losses_in_the_documents_fit_into_a_recipe(tmp_path):
    blocks = [block for block in yaml_blocks(ROOT / "docs" / "losses.md") if block.startswith("losses:")]
    assert blocks
    quickstart = re.sub(r"^losses:\n(  .*\n)+", "", read(shipped_recipes()["quickstart"]), flags=re.MULTILINE)
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(f"{quickstart}\n{block}", encoding="utf-8")
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("number", range(3))
def test_the_python_in_the_documents_runs(number):
    blocks = re.findall(r"```python\n(.*?)```", read(ROOT / "docs" / "losses.md"), flags=re.DOTALL)
    assert len(blocks) == 3
    exec(compile(blocks[number], f"docs/losses.md, block {number}", "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", read(path))
    for target in targets:
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(file), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_map_of_the_house_shows_every_file():
    rooms = sections(ROOT / "ARCHITECTURE.md")["Rooms"]
    assert [name for name in source_files() if not re.search(rf"\b{re.escape(Path(name).name)}\b", rooms)] == []


def test_the_map_of_the_house_shows_no_file_that_is_not_there():
    shown = set(re.findall(r"\b(\w+\.py)\b", sections(ROOT / "ARCHITECTURE.md")["Rooms"]))
    assert shown <= {Path(name).name for name in source_files()}


def test_the_doors_in_the_documents_are_those_that_are_enforced():
    rows = re.findall(r"^\| (`\w.*?) \| (.+?) \|$", sections(ROOT / "ARCHITECTURE.md")["Doors"], flags=re.MULTILINE)
    said = {
        room: set(re.findall(r"`(\w+)`", allowed)) for rooms, allowed in rows for room in re.findall(r"`(\w+)`", rooms)
    }
    enforced = dict(
        re.findall(r"^    \"(\w+)\": (\{.*?\}|set\(\)),$", read(ROOT / "tests" / "test_house.py"), re.MULTILINE)
    )
    for room, allowed in enforced.items():
        if (ROOT / "src" / "potstill" / room).exists() or (ROOT / "src" / "potstill" / f"{room}.py").exists():
            assert said[room] == set(re.findall(r"\"(\w+)\"", allowed)), room


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_exist(path):
    for file, name in re.findall(r"`(tests/[a-z_/]+\.py)`(?:[:, ]+`(test_\w+)`)?", read(path)):
        assert (ROOT / file).is_file(), file
        assert f"def {name}" in read(ROOT / file), (file, name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_functions_that_a_document_names_exist(path):
    """Written as `room/file.py:name`."""
    for file, name in re.findall(r"`([\w/]+\.py):(\w+)`", read(path)):
        source = read(ROOT / "src" / "potstill" / file)
        assert re.search(rf"^(?:    )?(?:def|class) {name}\b|^{name}\b", source, flags=re.MULTILINE), (file, name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_a_document_names_exist(path):
    from potstill.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    named = set(re.findall(r"(?:`|\n    )potstill ([a-z]+)", read(path)))
    assert named <= known
