"""How much of a model is dropped at random while it learns. Refuses to change its config, which is what is saved."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["find_dropout", "set_dropout"]


def find_dropout(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a model keeps the shares that it drops: modules, and the attributes of theirs that hold one.

    Where it was built without dropout there is nothing to be found. Attention takes its share as a number, which
    models keep as attention_dropout, dropout_prob or dropout.
    """
    found: list[tuple[nn.Module, str]] = []
    for part in model.modules():
        if isinstance(part, _DropoutNd):
            found.append((part, "p"))
        else:
            found += [(part, name) for name, value in vars(part).items() if "dropout" in name and _is_share(value)]
    return found


def set_dropout(model: nn.Module, share: float) -> None:
    """Let every dropout that the model was built with drop this share, in [0, 1), when it trains.

    Models that look the share up in their config at every step, as Falcon does, are not reached there: the config
    stays, and so what is saved. Srivastava et al. (2014), JMLR 15.
    """
    for part, name in find_dropout(model):
        setattr(part, name, share)


def _is_share(value: object) -> bool:
    """Configs have 0 for 0.0, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
