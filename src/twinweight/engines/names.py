"""How a model of transformers names its tensors, and how the checkpoint does: architectures renamed over the years."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinweight.checkpoint import Checkpoint
from twinweight.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INT4_LEAVES = frozenset(
    [
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
        "weight_shape",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    ]
)


@dataclass(frozen=True)
class Names:
    """tensors: model tensor name -> checkpoint tensor name. parents: model module -> checkpoint module, for containers of
    tensors.
    """

    tensors: Mapping[str, str]
    parents: Mapping[str, str]

    def module(self, name: str) -> str:
        """The checkpoint's name of a module, also of one that it stores fused with, or split into, siblings."""
        if name in self.parents:
            return self.parents[name]
        parent, _, last = name.rpartition(".")
        return f"{self.parents.get(parent, parent)}.{last}" if parent else last


def match_names(model: PreTrainedModel, ckpt: Checkpoint) -> Names:
    """Apply transformers' own renaming rules to every tensor of the checkpoint.

    Raises UnsupportedError where they ask for more than a new name (mixture-of-experts weights that transformers stacks).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    wanted = dict(model.state_dict())
    tensors: dict[str, str] = {}
    parents: dict[str, str] = {}
    for name in ckpt.names():
        module, _, leaf = name.rpartition(".")
        stands_for = f"{module}.weight" if leaf in _INT4_LEAVES else name  # the rules know dense names only
        new, converter = rename_source_key(stands_for, renamings, converters, model.base_model_prefix, wanted)
        if stands_for != name:
            new = f"{new.rpartition('.')[0]}.{leaf}"
        if converter is not None:
            raise UnsupportedError(
                file=ckpt.info(name).file, tensor=name, expected="one tensor a module",
                found="a mixture of experts, which this engine does not run (vLLM does)",
            )  # fmt: skip
        tensors[new] = name
        here, there = new, name
        while "." in here and "." in there:
            here, there = here.rpartition(".")[0], there.rpartition(".")[0]
            parents.setdefault(here, there)
    return Names(tensors, parents)
