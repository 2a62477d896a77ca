"""A transformers model run block by block: every batch of tokens is one forward pass, which waits at each block.

    batch 0   model(tokens)  embedding, masks  [block 0] ...waits...  what lies between  [block 1] ...waits...  norm
    batch 1   model(tokens)  embedding, masks  [block 0] ...waits...  what lies between  [block 1] ...waits...  norm
                                               load 0                                    load 1

    forward(batch)   runs the current block on what the model hands it there; the pass goes on waiting
    advance()        runs it once more, for good, on all batches; every pass goes on to its next block

A block thus gets the very arguments that the model gives it, whatever they are: masks and positions of its kind of
layer, keys and values that an earlier block left for it, what the block before it returned besides hidden states. A
function can only wait inside of another one in a thread of its own, so each pass has one; never do two run at a time,
and blocks and linears run in the caller's thread.

Memory: the hidden states of all tokens where the passes wait, and what else the model's own forward keeps: its
embeddings, which are as large, and for Gemma 4 the inputs of each layer.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
import weakref
from collections import Counter, UserDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from ..dense.kinds import is_linear, is_transposed
from ..dense.towers import towers
from ..errors import MPQError, QuantizeError
from ..files.strict import short
from ..quantize import suitable


class Stop(Exception):
    """Ends a forward pass when all that was asked of it has been seen. May be raised by hooks."""


class ModelFails(QuantizeError):
    """The model itself raised something when it was run on tokens."""


@dataclass(frozen=True, eq=False)
class Call:
    """Where a pass waits: at a block (its index), or at a linear outside of the blocks (its name).

    run: the module's own forward; context: the pass's context variables, in which it is run.
    """

    place: int | str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: contextvars.Context

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module. Raises QuantizeError for whatever it raises, but Stop."""
        with _in_words():
            return self.context.run(self.run, *args, **kwargs)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, the hidden states first."""
        return [*_tensors(self.args), *_tensors([self.kwargs[key] for key in sorted(self.kwargs, key=_hidden_first)])]


@dataclass(eq=False)
class Pass:
    """The forward pass of one batch. call: where it waits, None when it has ended.

    seen: (linear, input) of every call outside of the blocks so far. hidden: what enters the block where it waits; what
    left the last one when it has ended.
    """

    inputs: Mapping[str, torch.Tensor]
    head: str | None
    asks: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    call: Call | None = None
    seen: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    hidden: torch.Tensor | None = None

    def start(self, model: Any) -> None:
        """Run up to the first block."""
        threads = torch.get_num_threads()
        args = (model, self.inputs, self.asks, self.answers)
        threading.Thread(target=_forward, args=args, name="calibration pass", daemon=True).start()
        try:
            self._wait()
        finally:
            torch.set_num_threads(threads)

    def go_on(self, output: Any) -> None:
        """Give the block where the pass waits its output, and run up to the next one."""
        self.call = None
        self.hidden = next(iter(_tensors(output)), None)
        self.answers.put(output)
        self._wait()

    def _wait(self) -> None:
        """Until the pass waits at a block, or has ended. Raises what it raised."""
        while True:
            asked = self.asks.get()
            if isinstance(asked, BaseException):
                with _in_words():
                    raise asked
            if asked is None or isinstance(asked.place, int):
                break
            self.seen.append((asked.place, asked.tensors()[0]))
            self.answers.put(Stop if asked.place == self.head else asked(asked.args, asked.kwargs))
        if asked is not None:
            self.call, self.hidden = asked, next(iter(asked.tensors()), None)


_here = threading.local()  # .queues: of the pass that a thread runs


def _forward(model: Any, inputs: Mapping[str, torch.Tensor], asks: SimpleQueue[Any], answers: SimpleQueue[Any]) -> None:
    """What the thread of a pass does."""
    _here.queues = asks, answers
    # The little that is computed here needs no threads, and each pass would hold as many of its own. Asking for the
    # number first makes it this thread's, which the caller's own, set again behind it, then leaves alone.
    torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except Stop:
        asks.put(None)
    except BaseException as error:  # noqa: BLE001  (raised again by the thread that waits for this one)
        asks.put(error)
    else:
        asks.put(None)


def _waiting(place: int | str, run: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for the forward method of a block or linear: in the thread of a pass, it asks and waits."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Hand over the arguments, wait for the output."""
        queues = getattr(_here, "queues", None)
        if queues is None:
            return run(*args, **kwargs)
        asks, answers = queues
        asks.put(Call(place, run, args, kwargs, contextvars.copy_context()))
        del args, kwargs
        answer = answers.get()
        if answer is Stop:
            raise Stop
        return answer

    return forward


class BlockWalk:
    """The walk of some tokens through a model's blocks.

    batches: tokens int64 [n, sequence] of each pass. current: index of the block where the passes wait; the number of
    blocks when the walk is through and only linears outside of them are left.
    """

    def __init__(
        self,
        model: Any,
        inputs: Iterable[Mapping[str, torch.Tensor]],
        device: torch.device,
        load: Callable[[int], None],
    ) -> None:
        """Stand before the first block. The model is changed: blocks that were passed are on the meta device.

        inputs: keywords of the model's forward, of one pass each; with input_ids or decoder_input_ids. load: gives a
        block its parameters, in fp32 on the device; for the number of blocks, all outside of them. Raises
        QuantizeError: a model without blocks, or one that does not run on these inputs.
        """
        self.model, self.device, self.load = model.eval(), device, load
        self.blocks = find_blocks(model)
        self.names, self.places = list(self.blocks), places_of(self.blocks)
        self._refuse_shared_weights()
        placed = [{name: _on(value, device) for name, value in each.items()} for each in inputs]
        self.batches = [each["input_ids"] if "input_ids" in each else each["decoder_input_ids"] for each in placed]
        load(len(self.blocks))
        for index, block in enumerate(self.blocks.values()):
            block.forward = _waiting(index, block.forward)
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if self.stage(name) == len(self.blocks) and (is_linear(module) or module is head):
                module.forward = _waiting(name, module.forward)
        named = {module: name for name, module in model.named_modules()}
        self.passes = [Pass(each, named.get(head)) for each in placed]
        weakref.finalize(self, _end, self.passes)
        self.current = 0
        self.writes: bool | None = None  # whether the current block writes into tensors that it is given
        inner = [parameter for block in self.blocks.values() for parameter in block.parameters()]
        before = [parameter._version for parameter in inner]
        for one in self.passes:
            one.start(model)
        if before != [parameter._version for parameter in inner]:
            raise QuantizeError(
                f"{type(model).__name__} changes the weights of its blocks when it is first run, and calibration reads "
                f"them after that; {without_text()}"
            )
        self._enter()

    def _refuse_shared_weights(self) -> None:
        for name, other in self.model.all_tied_weights_keys.items():
            stages = {self.stage(name), self.stage(other)}
            if len(stages) > 1 and stages != {self.stage(name), len(self.blocks)}:
                raise QuantizeError(
                    f"{name} is the same weight as {other}, and calibration has one block in memory at a time; "
                    f"{without_text()}"
                )

    @property
    def hidden(self) -> list[torch.Tensor]:
        """What enters the current block for each batch, fp32 [n, sequence, hidden]; at the end, what left the last."""
        return [one.hidden for one in self.passes if one.hidden is not None]

    def stage(self, name: str) -> int:
        """Index of the block that a module is in; the number of blocks for one outside."""
        return stage_of(self.places, name)

    def linears(self) -> list[str]:
        """Names of the linears of the current block."""
        if self.current == len(self.blocks):
            return []
        block = self.names[self.current]
        return [f"{block}.{name}" for name, module in self.blocks[block].named_modules() if is_linear(module)]

    def outside(self, index: int) -> list[tuple[str, torch.Tensor]]:
        """(linear, input) of every call outside of the blocks in a batch, when the walk is through them; or nothing."""
        if self.current < len(self.blocks):
            return []
        return list(self.passes[index].seen)

    @torch.no_grad()
    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Replace the weight [N, K] of a linear in the current block. A head keeps its own, which may be tied."""
        if self.stage(name) < len(self.blocks):
            linear = self.model.get_submodule(name)
            linear.weight.copy_(weight.T if is_transposed(linear) else weight)

    @torch.no_grad()
    def forward(self, index: int) -> None:
        """Run the current block on one batch, until a hook raises Stop; nothing where its pass waits elsewhere."""
        call = self.passes[index].call
        if call is None or call.place != self.current:
            return
        # A block may write into what it is given, and will be run on it again: it gets containers of its own, and
        # where it has been seen to write into tensors, or has not been watched to its end yet, copies of those.
        args, kwargs = _own(call.args, self.writes is not False), _own(call.kwargs, self.writes is not False)
        given = [*_tensors(args), *_tensors(list(kwargs.values()))]
        before = [tensor._version for tensor in given]
        with contextlib.suppress(Stop):
            call(args, kwargs)
            if self.writes is None:
                self.writes = before != [tensor._version for tensor in given]

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next block. Raises QuantizeError where the model calls a block again that was passed."""
        for one in self.passes:
            call = one.call
            if call is None or call.place != self.current:
                continue
            output = call(call.args, call.kwargs)
            del call
            one.go_on(output)
            del output
            if one.call is not None and one.call.place <= self.current:  # type: ignore[operator]
                again = self.names[one.call.place]  # type: ignore[index]
                raise QuantizeError(
                    f"{type(self.model).__name__} runs {again} again after {self.names[self.current]}, and calibration "
                    f"comes by each block once; {without_text()}"
                )
        self.blocks[self.names[self.current]].to("meta")
        self.current += 1
        self._enter()

    def _enter(self) -> None:
        self.writes = None
        if any(one.call is not None and one.call.place == self.current for one in self.passes):
            self.load(self.current)


def _on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, in fp32 if it holds no whole numbers."""
    return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)


def _end(passes: list[Pass]) -> None:
    """Let the threads of passes that still wait come to their end."""
    for one in passes:
        one.answers.put(Stop)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Whatever a model raises becomes ModelFails."""
    try:
        yield
    except (Stop, MPQError, MemoryError):
        raise
    except Exception as error:  # any type comes out of transformers
        raise ModelFails(
            f"the model cannot be run on tokens alone, block by block ({type(error).__name__}: "
            f"{short(str(error), 200)}); {without_text()}"
        ) from error


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> block: the members of every outermost ModuleList that has linears inside of its members.

    In model order, but those of towers first: they run before the blocks that read what they make. A list beside a
    longer one in a tower runs between that one's members (Qwen3-VL's mergers), and is outside. Raises QuantizeError for
    a model without any.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{block}.") for block in blocks):
            continue
        inner = [part for member in module for part in member.modules() if part is not member]
        if any(map(is_linear, inner)):
            blocks |= {f"{name}.{index}": member for index, member in module.named_children()}
    if not blocks:
        raise QuantizeError(
            f"calibration walks through a model that is made of blocks, and {type(model).__name__} has none; "
            f"{without_text()}"
        )
    beside = towers(model)
    seeing = [name for name in blocks if any(linear.startswith(f"{name}.") for linear in beside)]
    lists = Counter(map(_parent, seeing))
    longest = {_parent(name): count for name, count in sorted(lists.items(), key=lambda item: item[1])}
    first = [name for name in seeing if lists[_parent(name)] == longest[_parent(_parent(name))]]
    return {name: blocks[name] for name in [*first, *(name for name in blocks if name not in seeing)]}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def places_of(blocks: Collection[str]) -> dict[str, int]:
    """Name -> index of each block."""
    return {name: index for index, name in enumerate(blocks)}


def stage_of(places: Mapping[str, int], name: str) -> int:
    """Index of the block that a module or parameter is in; the number of blocks for one outside."""
    end = name.find(".")
    while end >= 0:
        if name[:end] in places:
            return places[name[:end]]
        end = name.find(".", end + 1)
    return places.get(name, len(places))


def without_text() -> str:
    """What to choose where a model cannot be calibrated."""
    return f"choose a quantizer that needs no calibration: {suitable(lambda row: not row.needs_calibration)}"


def _hidden_first(key: str) -> tuple[bool, str]:
    return key != "hidden_states", key


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | UserDict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _own(value: Any, clone: bool) -> Any:
    """Nested containers rebuilt, so that what is put into them stays there. clone: and with copies of tensors."""
    if isinstance(value, torch.Tensor):
        return value.clone() if clone else value
    if isinstance(value, list | dict | UserDict):
        out: Any = copy.copy(value)
        for key in range(len(out)) if isinstance(out, list) else list(out):
            out[key] = _own(out[key], clone)
        return out
    if isinstance(value, tuple):
        parts = [_own(part, clone) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
