"""How much of a model is dropped at random while it learns. Refuses to change its config, which is what is saved."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["find_dropout", "set_dropout"]


def find_dropout(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a model keeps the shares that it drops: modules, and the attributes of theirs that hold one.

    Attention takes its share as a number, which models keep as attention_dropout, dropout_prob or dropout.
    """
    found: list[tuple[nn.Module, str]] = []
    for part in model.modules():
        if isinstance(part, _DropoutNd):
            found.append((part, "p"))
        else:
            found += [(part, name) for name, value in vars(part).items() if "dropout" in name and type(value) is float]
    return found


def set_dropout(model: nn.Module, share: float) -> None:
    """Let every dropout of the model, in its layers and in its attention, drop this share, in [0, 1), when it trains.

    The model's config stays, and so what is saved. Srivastava et al. (2014), JMLR 15.
    """
    for part, name in find_dropout(model):
        setattr(part, name, share)
