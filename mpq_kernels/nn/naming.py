"""Names of packed tensors while transformers loads and saves a model: its renamings pass them over.

transformers renames, splits and merges stored tensors, by patterns, into a model's parameters, and does the opposite
when it saves. Packed tensors have the names of their modules already, are no matrices that could be split, and the
patterns may fit their names. So the transforms are wrapped:

    PackedNames         first: a packed tensor's name in the files becomes that in the model, and back when it is saved
    SparedRenaming      transformers' own, for all other tensors
    SparedConverter     the same

Spared are also tensors that have their own names of the model in the files: they keep those when the model is saved,
where transformers would merge them with others that are packed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming

from ..checkpoint.config import Float8Module, PackedModule
from ..dense.conversions import Table

NEVER = "(?!)"  # a pattern that nothing fits


class Names(frozenset[str]):
    """A set of names that copies of a transform share."""

    def __deepcopy__(self, memo: Any) -> Names:
        return self


class PackedNames(WeightRenaming):
    """Names of packed tensors: `there` when a model is loaded, `back` when it is saved."""

    __slots__ = ("back", "there")

    def __init__(self, there: Mapping[str, str], back: Mapping[str, str]) -> None:
        super().__init__(NEVER, NEVER)
        self.there, self.back = dict(there), dict(back)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(the name, the pattern that it fitted or None)"""
        found = self.there.get(source_key)
        return (source_key, None) if found is None else (found, NEVER)

    def reverse_transform(self) -> PackedNames:
        """For saving."""
        return PackedNames(self.back, self.there)

    def was_used(self) -> bool:
        """transformers forgets transforms that were not."""
        return True


class SparedRenaming(WeightRenaming):
    """A renaming of transformers that passes over some names."""

    __slots__ = ("inner", "spared")

    def __init__(self, inner: WeightRenaming, spared: Names) -> None:
        super().__init__(list(inner._original_source_patterns), list(inner._original_target_patterns))
        self.inner, self.spared = inner, spared

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(the name, the pattern that it fitted or None)"""
        return (source_key, None) if source_key in self.spared else self.inner.rename_source_key(source_key)

    def reverse_transform(self) -> SparedRenaming:
        """For saving."""
        back: Any = self.inner.reverse_transform()
        return SparedRenaming(back, self.spared)

    def was_used(self) -> bool:
        """Whether it renamed anything."""
        used: bool = self.inner.was_used()
        return used


class SparedConverter(WeightConverter):
    """A converter of transformers that passes over some names."""

    __slots__ = ("spared",)
    spared: Names

    @classmethod
    def of(cls, converter: WeightConverter, spared: Names) -> SparedConverter:
        """The same converter, which has collected nothing yet."""
        new = cls(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            list(converter.operations),
        )
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        if hasattr(converter, "force_cpu"):
            new.force_cpu = converter.force_cpu
        new.spared = spared
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(the name, the pattern that it fitted or None)"""
        return (source_key, None) if source_key in self.spared else super().rename_source_key(source_key)

    def reverse_transform(self) -> SparedConverter:
        """For saving."""
        back: Any = super().reverse_transform()
        back.spared = self.spared
        reversed_one: SparedConverter = back
        return reversed_one


def spared_transforms(transforms: Iterable[Any], names: PackedNames, own: Collection[str]) -> list[Any]:
    """transformers' transforms of a model, which now leave its packed tensors, and those named in `own`, alone."""
    spared = Names({*names.there, *names.there.values(), *names.back, *names.back.values(), *own})
    wrapped = [
        SparedConverter.of(transform, spared)
        if isinstance(transform, WeightConverter)
        else SparedRenaming(transform, spared)
        for transform in transforms
    ]
    return [names, *wrapped]


def packed_names(modules: Mapping[str, PackedModule | Float8Module]) -> PackedNames:
    """Names of the tensors of packed modules. modules: name in the files -> the module, with its name in the model.

    A model that is saved writes the names that its own config has.
    """
    there, back = {}, {}
    for stored, module in modules.items():
        for name in module.tensor_names:
            key = name.removeprefix(f"{module.name}.")
            there[f"{stored}.{key}"] = f"{module.installed}.{key}"
            back[f"{module.installed}.{key}"] = name
    return PackedNames(there, back)


def own_names(model: Any, stored: Iterable[str], packed: PackedNames) -> set[str]:
    """Stored tensors that the model calls by the same name, also as the model calls them: with another prefix."""
    table, out = Table(model), set()
    for name in table.in_order(name for name in stored if name not in packed.there):
        target, pattern = table.target(name)
        if pattern is None and target in table.state and name in (target, *table.spellings(target)):
            out |= {name, target}
    return out
