"""What lies behind a model's answers: hidden states, attention maps, and queries, keys and values, of one forward pass.

Queries and keys are taken where every architecture of transformers hands them to its attention function, so that they
are those that are multiplied: after biases, norms and rotary embeddings, fused projections taken apart. Refuses a model
that computes attention in a way of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from potstill.errors import ModelError
from potstill.types import AttentionVectors, Wants

__all__ = ["NOTHING", "Insides", "needs_eager", "reading_insides"]

NOTHING = Wants()
"""Nothing but what a model answers."""


@dataclass(frozen=True, slots=True)
class Insides:
    """What was found behind the answers, by number of layer or block, as in `Wants`; filled while the model reads.

    hidden  {layer: [B, T, D]}; attentions  {block: [B, H, T, T]}, float32; vectors  {block: AttentionVectors}
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attentions: dict[int, Tensor] = field(default_factory=dict)
    vectors: dict[int, AttentionVectors] = field(default_factory=dict)


def needs_eager(wants: Wants) -> bool:
    """Whether a model must be loaded with `attn_implementation="eager"` to give what is wanted: its attention maps."""
    return bool(wants.attentions)


@contextmanager
def reading_insides(model: Any, wants: Wants) -> Iterator[Insides]:
    """Within the context, what one forward pass of `model` computes on its way and is wanted is put into the `Insides`.

    Hidden states are those of transformers' `hidden_states` (the last one after the final norm). Attention maps are the
    probabilities softmax(mask + scale * Q K^T), without the dropout that a model in training puts on them. A student's
    have a gradient. Raises ModelError for a number that the model does not have, a model whose attention implementation
    gives no maps, and one that does not attend through transformers' attention functions.
    """
    if not (wants.layers or wants.attentions or wants.vectors):
        yield Insides()
        return
    blocks = _blocks(model)
    _check_numbers(model, wants, len(blocks))
    insides = Insides()
    hooks = _watch_hidden(model.base_model, wants.layers, insides.hidden)
    try:
        with _watching_attention(_Watch(blocks, wants, insides)):
            yield insides
    finally:
        for hook in hooks:
            hook.remove()
    _check_found(model, wants, insides)


def _blocks(model: Any) -> Sequence[nn.Module]:
    """The stack of blocks, in order: the first list of modules that is as long as the model is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((list(stack) for stack in stacks if len(stack) == depth), [])


def _check_numbers(model: Any, wants: Wants, depth: int) -> None:
    name = type(model).__name__
    for kind, first, numbers in (
        ("hidden state", 0, wants.layers),
        ("attention map", 1, wants.attentions),
        ("queries, keys and values", 1, wants.vectors),
    ):
        if numbers and not depth:
            raise ModelError(
                f"{name}: its stack of blocks was not found, so that {kind} cannot be read. Use BERT's like."
            )
        absent = [number for number in numbers if not first <= number <= depth]
        if absent:
            raise ModelError(
                f"losses.layers: {kind} {absent[0]} was asked of {name}, which has {first}..{depth}. Use one of these."
            )


def _watch_hidden(body: nn.Module, layers: tuple[int, ...], hidden: dict[int, Tensor]) -> list[Any]:
    if not layers:
        return []

    def ask(_module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**options, "output_hidden_states": True, "return_dict": True}

    def take(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden.update({layer: output.hidden_states[layer] for layer in layers})

    return [body.register_forward_pre_hook(ask, with_kwargs=True), body.register_forward_hook(take)]


class _Watch:
    """Stands between the blocks of one model and their attention function, and keeps what is wanted of it."""

    def __init__(self, blocks: Sequence[nn.Module], wants: Wants, insides: Insides) -> None:
        numbered = [(number, block) for number, block in enumerate(blocks, start=1)]
        self.numbers = {id(part): number for number, block in numbered for part in block.modules()}
        self.wants, self.insides = wants, insides
        self.maps: dict[int, Callable[[], Tensor]] = {}

    def beside(self, attend: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """`attend`, being watched; `eager` is the architecture's own attention, which gives maps."""

        def watched(
            module: nn.Module, queries_BHTE: Tensor, keys_BGTE: Tensor, values_BGTE: Tensor, *args: Any, **options: Any
        ) -> Any:
            given = (module, queries_BHTE, keys_BGTE, values_BGTE, *args)
            output = attend(*given, **options)
            number = self.numbers.get(id(module), 0)
            if number in self.wants.vectors:
                self.insides.vectors[number] = AttentionVectors(queries_BHTE, keys_BGTE, values_BGTE)
            if number in self.wants.attentions and output[1] is not None:
                self.maps[number] = partial(_probabilities, partial(eager, *given), options, output[1])
            return output

        return watched

    def finish(self) -> None:
        """Work out the maps: only now, since a block under activation checkpointing must do no more than it repeats."""
        self.insides.attentions.update({number: maps() for number, maps in self.maps.items()})


def _probabilities(attend: Callable[..., Any], options: dict[str, Any], maps_BHTT: Tensor) -> Tensor:
    """The maps that came back, float32; worked out anew in training, where those have been through dropout."""
    if options.get("dropout", 0.0) > 0.0:
        maps_BHTT = attend(**{**options, "dropout": 0.0})[1]
    return maps_BHTT.float()


@contextmanager
def _watching_attention(watch: _Watch) -> Iterator[None]:
    """Every architecture asks one registry for its attention function at each forward pass: it is answered for here."""
    if not (watch.wants.attentions or watch.wants.vectors):
        yield
        return
    found, own = ALL_ATTENTION_FUNCTIONS.get_interface, vars(ALL_ATTENTION_FUNCTIONS).get("get_interface")
    ALL_ATTENTION_FUNCTIONS.get_interface = lambda name, eager: watch.beside(found(name, eager), eager)
    try:
        yield
        watch.finish()
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
        if own is not None:  # one context within another
            ALL_ATTENTION_FUNCTIONS.get_interface = own


def _check_found(model: Any, wants: Wants, insides: Insides) -> None:
    name, chosen = type(model).__name__, model.config.get_text_config()._attn_implementation
    if set(wants.vectors) - set(insides.vectors):
        raise ModelError(
            f"{name} computes attention in a way of its own, so that its queries, keys and values cannot be read. Use "
            "another architecture (BERT, DistilBERT, RoBERTa, ELECTRA, ModernBERT, Llama, GPT-2), or other losses."
        )
    if set(wants.attentions) - set(insides.attentions):
        raise ModelError(
            f"{name} returned no attention maps (attn_implementation={chosen!r}): needs 'eager' and an architecture "
            'that attends through transformers\' attention functions. Load it with attn_implementation="eager", or use '
            "other losses."
        )
