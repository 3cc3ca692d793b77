"""Whether the parts of a recipe suit its task, as far as the recipe alone says.

Refuses what no data could make right.
"""

from __future__ import annotations

from collections.abc import Iterator

from potstill.errors import RecipeError
from potstill.pipeline.chain import load_chain
from potstill.pipeline.objective import fixed
from potstill.recipes import Recipe
from potstill.recipes.losses import CrossEntropy, SoftTerm, VocabularyTerm
from potstill.recipes.schema import (
    Classification,
    FinetuneTeacher,
    LanguageModel,
    LayersStudent,
    LocalTeacher,
    MaskedLM,
    MixtureTeacher,
    OnlineSignals,
    OpenAITeacher,
    PretrainedStudent,
    RecordedTeacher,
)
from potstill.recipes.signals import (
    DenseSignals,
    HighestEntropyPositions,
    TopKRenormalisedSignals,
    TopKSignals,
)

__all__ = ["check_task"]


def check_task(recipe: Recipe) -> None:
    """Raises RecipeError, naming the key, for the first part that does not suit `task`."""
    for problem in _problems(recipe):
        raise RecipeError(problem)


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _writing_problems(recipe)
    yield from _assistant_problems(recipe)
    yield from _teacher_problems(recipe)
    yield from _api_problems(recipe)
    yield from _student_problems(recipe)
    yield from _signal_problems(recipe)
    if recipe.over_texts:
        yield from _text_problems(recipe)
    else:
        yield from _token_problems(recipe)


def _writing_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.generate is None:
        return
    if not isinstance(recipe.task, LanguageModel):
        yield (
            f"generate: a teacher writes for language models, but task.kind={recipe.task.kind}. Remove generate: for "
            "labels from an API, teacher.kind=openai alone is enough."
        )
    if not isinstance(recipe.teacher, OpenAITeacher | LocalTeacher):
        yield (
            f"teacher.kind: {recipe.teacher.kind} cannot be asked to write. Use local; or serve the model (vLLM, "
            "llama.cpp) and use openai with its base_url; or remove generate."
        )
    judged = recipe.generate.verify
    column = getattr(judged, "answer", None) or getattr(judged, "tests", None)
    if recipe.generate.prompts.kind in ("self_instruct", "evolved") and judged and column:
        yield (
            f"generate.verify.kind: {judged.kind} compares with the column {column!r} of a row, which prompts that the "
            f"teacher writes (generate.prompts.kind={recipe.generate.prompts.kind}) do not have. Use another verifier."
        )
    if not isinstance(recipe.signals, OnlineSignals):
        yield (
            f"signals.kind: {recipe.signals.kind} keeps what a teacher says of rows, but here it writes them. Remove "
            "signals, or generate."
        )


def _assistant_problems(recipe: Recipe) -> Iterator[str]:
    for assistant in load_chain(recipe)[:1]:
        if assistant.task.kind != recipe.task.kind:
            yield (
                f"teacher.recipe: {assistant.name} has task.kind={assistant.task.kind}, this recipe "
                f"{recipe.task.kind}. Give both the same task."
            )


def _teacher_problems(recipe: Recipe) -> Iterator[str]:
    task, teacher = recipe.task, recipe.teacher
    if isinstance(teacher, RecordedTeacher) and not isinstance(task, Classification):
        yield (
            f"teacher.kind: recorded answers are classes of texts, but task.kind={task.kind}. Use "
            "task.kind=classification, or another teacher."
        )
    if isinstance(teacher, RecordedTeacher) and teacher.match == "id" and recipe.data.noise:
        yield (
            "teacher.match: id, but data.noise makes copies with ids of their own, of which nothing was recorded. Use "
            "teacher.match=text, which gives a copy the answer to its text; or remove noise."
        )
    if isinstance(teacher, MixtureTeacher) and not isinstance(task, LanguageModel | Classification):
        yield f"teacher.kind: mixture averages probabilities, which task.kind={task.kind} does not do. Use one model."
    if isinstance(teacher, MixtureTeacher) and recipe.over_texts and any(one.sources for one in teacher.members):
        yield "teacher.members[].sources: weights by source are for language models. Use weight alone."
    if isinstance(teacher, FinetuneTeacher) and recipe.task.kind == "embedding":
        yield "teacher.kind: finetune needs labels, which task.kind=embedding has none of. Use teacher.kind=local."
    if isinstance(teacher, FinetuneTeacher) and teacher.learns == "head" and isinstance(task, LanguageModel):
        yield (
            "teacher.learns: head trains a head that the model lacks, but a language model has its own. Use "
            "teacher.learns=all."
        )


def _api_problems(recipe: Recipe) -> Iterator[str]:
    """Of an API that is asked about what is there: what it writes itself is looked at elsewhere."""
    task, teacher, signals = recipe.task, recipe.teacher, recipe.signals
    if not isinstance(teacher, OpenAITeacher) or recipe.generate is not None:
        return
    if isinstance(task, LanguageModel):
        yield from _scoring_problems(recipe, teacher)
        return
    if not isinstance(task, Classification) or task.multi_label:
        several = " with multi_label" if isinstance(task, Classification) else ""
        yield (
            f"teacher.kind: openai is asked for one label a text, but task.kind={task.kind}{several} wants something "
            "else. Use task.kind=classification with one label a text, or another teacher."
        )
    if isinstance(signals, OnlineSignals):
        yield (
            "signals.kind: online would ask the API in every step of the training. Use signals.kind=dense, which asks "
            "about every text once."
        )
    if isinstance(signals, DenseSignals) and signals.features:
        yield "signals.features: teacher.kind=openai shows nothing of what lies behind its answers. Leave it out."
    if recipe.static:
        yield (
            "static: embeddings are distilled from the teacher's encoder, but teacher.kind=openai has none here. "
            "Remove static, or use another teacher."
        )


def _scoring_problems(recipe: Recipe, teacher: OpenAITeacher) -> Iterator[str]:
    """Of an API that is asked for the log-probabilities of given text."""
    signals = recipe.signals
    if isinstance(signals, OnlineSignals):
        yield (
            "teacher.kind: openai teaches a language model by what it writes, and generate is not there. Add generate: "
            "{prompts: {kind: rows}}, for example; or, of a vLLM server, signals: {kind: topk, k: 20}."
        )
    if not isinstance(signals, TopKSignals | TopKRenormalisedSignals):
        yield (
            f"signals.kind: {signals.kind} needs all that a teacher says, but an API lists its likeliest tokens. Use "
            "signals.kind=topk."
        )
        return
    if isinstance(signals.positions, HighestEntropyPositions):
        yield (
            "signals.positions.kind: highest_entropy needs all probabilities, but an API lists those of the likeliest "
            "tokens. Use random, or all."
        )
    asked = [fixed(term.temperature) for term in recipe.losses if isinstance(term, SoftTerm)]
    if odd := [value for value in [*(signals.temperatures or ()), *asked] if value != 1.0]:
        yield (
            f"losses[].temperature: {odd[0]:g}, but an API says what all unlisted tokens have together at temperature "
            "1 alone. Use 1, there and in signals.temperatures."
        )
    yield from _endpoint_problems(teacher)


def _endpoint_problems(teacher: OpenAITeacher) -> Iterator[str]:
    """What keeps an endpoint from scoring given text."""
    if teacher.api != "completion":
        yield (
            f"teacher.api: {teacher.api} takes messages, but given text is scored token by token. Use api: completion."
        )
    if teacher.tokenizer is None:
        yield (
            "teacher.tokenizer: is not set, so that nobody knows whether the student numbers tokens like the teacher. "
            "Name the hub id or folder of the teacher's tokenizer."
        )
    if teacher.batch:
        yield "teacher.batch: no provider's batch API scores given text. Leave it out."
    if teacher.budget.partial:
        yield (
            "teacher.budget.partial: true, but rows of which the teacher says nothing cannot be learned from. Leave it "
            "out, or lower training.steps."
        )


def _student_problems(recipe: Recipe) -> Iterator[str]:
    student, task = recipe.student, recipe.task
    if recipe.static and not isinstance(task, Classification):
        yield f"static: is a classifier, but task.kind={task.kind}. Remove it."
    if recipe.static and isinstance(recipe.teacher, RecordedTeacher):
        yield (
            "static: embeddings are distilled from the teacher's encoder, but teacher.kind=recorded has none here. "
            "Remove static, or use another teacher."
        )
    if recipe.static and recipe.static.training.freeze_embeddings:
        yield "static.training.freeze_embeddings: embeddings are nearly all that learns there. Leave it out."
    if recipe.static and recipe.static.training.dropout is not None:
        yield "static.training.dropout: there is nothing between embeddings and their mean to drop. Leave it out."
    if recipe.static and recipe.data.text_pair:
        yield "static: reads one text, but data.text_pair names a second one. Remove static."
    if recipe.phases:
        return  # the first of them makes the student, and is looked at by itself
    absent = isinstance(recipe.teacher, RecordedTeacher | OpenAITeacher)
    if absent and not (isinstance(student, PretrainedStudent | LayersStudent) and student.model is not None):
        yield (
            f"student.kind: {student.kind} is made from the teacher's model, but teacher.kind={recipe.teacher.kind} "
            "has none here. Use student.kind=model, or layers of a student.model."
        )
    if isinstance(student, LayersStudent) and student.keep == "greedy" and not isinstance(task, LanguageModel):
        yield (
            f"student.keep: greedy judges layers by the next token, but task.kind={task.kind}. Use `even`, or list "
            "the layers."
        )
    if isinstance(student, LayersStudent) and student.architecture == "distilbert" and isinstance(task, LanguageModel):
        yield "student.architecture: distilbert is an encoder, but task.kind=language_model. Leave it out."


def _signal_problems(recipe: Recipe) -> Iterator[str]:
    signals, task = recipe.signals, recipe.task
    if isinstance(task, MaskedLM) and not isinstance(signals, OnlineSignals):
        yield (
            f"signals.kind: {signals.kind} keeps what was said of fixed tokens, but masks are drawn anew in every "
            "epoch. Use signals.kind=online."
        )
    if isinstance(signals, DenseSignals) and signals.features and not recipe.over_texts:
        yield f"signals.features: is for tasks over texts, but task.kind={task.kind}. Leave it out."
    if not recipe.over_texts:
        return
    if not isinstance(signals, OnlineSignals | DenseSignals):
        yield (
            f"signals.kind: {signals.kind} is for tokens of a vocabulary; an answer to a text is kept whole. Use "
            "signals.kind=dense, or online."
        )
    if isinstance(recipe.teacher, RecordedTeacher) and not isinstance(signals, OnlineSignals):
        yield "signals.kind: recorded answers are in a file already. Leave signals out."
    if isinstance(signals, DenseSignals) and not signals.everywhere:
        yield "signals.positions: an answer to a text is kept whole. Leave positions out."
    if recipe.static and isinstance(signals, OnlineSignals):
        yield (
            "signals.kind: online reads the student's tokens, and static has others. Use signals.kind=dense, which "
            "keeps the teacher's answers by text."
        )
    if recipe.static and not any(isinstance(term, VocabularyTerm) for term in recipe.losses):
        yield "static: learns from answers alone, and no loss compares them. Add forward_kl, or remove static."


def _text_problems(recipe: Recipe) -> Iterator[str]:
    trained = {"training": recipe.training}
    if isinstance(recipe.teacher, FinetuneTeacher):
        trained["teacher.training"] = recipe.teacher.training
    if recipe.static:
        trained["static.training"] = recipe.static.training
    for key, training in trained.items():
        if training.tokens is not None:
            yield f"{key}.tokens: counts packed positions, which task.kind={recipe.task.kind} has none of. Use epochs."
        if training.compile is True:
            yield f"{key}.compile: texts have any length, and each would be compiled anew. Leave compile out."
    yield from _data_problems(recipe)
    learned = [term for term in recipe.losses if not isinstance(term, CrossEntropy)]
    if recipe.data.unlabelled and not learned:
        yield (
            "data.unlabelled: without labels only a teacher can be learned from, but no loss compares with one. Add "
            "forward_kl, or remove unlabelled."
        )


def _data_problems(recipe: Recipe) -> Iterator[str]:
    task, data = recipe.task, recipe.data
    if data.max_tokens is not None:
        yield f"data.max_tokens: counts packed tokens, which task.kind={task.kind} has none of. Use data.max_documents."
    if not isinstance(task, Classification):
        for key in ("labels_per_class", "noise"):
            if getattr(data, key) is not None:
                yield f"data.{key}: is for classification, but task.kind={task.kind}. Remove it."
    elif task.multi_label and data.labels_per_class is not None:
        yield "data.labels_per_class: counts texts of one label, but task.multi_label is true. Remove it."


def _token_problems(recipe: Recipe) -> Iterator[str]:
    for key in ("text_pair", "slice", "unlabelled", "labels_per_class", "noise"):
        if getattr(recipe.data, key) is not None:
            yield f"data.{key}: is for tasks over texts, but task.kind={recipe.task.kind}. Remove it."
    if recipe.evaluation.price:
        yield f"evaluation.price: is for tasks over texts, but task.kind={recipe.task.kind}. Remove it."
