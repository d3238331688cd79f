"""A GPU for machines without one: tensors on the device ``pretend`` hold CPU tensors, and refuse what CUDA refuses.

An operation on tensors of two devices fails, as do a generator of the other device and a view as a NumPy array. Each place
of the package that waits for the device is counted, because on a GPU it costs more than what it waits for. Half precision,
fused kernels, pinned memory and streams are not pretended.

It uses torch's way of writing devices in Python (`_setup_privateuseone_for_python_backend`), once and for all in a process:
use it in processes of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

NAME = "pretend"
ROOT = Path(__file__).resolve().parent.parent
OURS = ("nnssl_ext", "trainers", "planners", "dataset_conversion")
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
"""Operations whose tensors may lie on two devices. Others take a number from the CPU, and indexing takes CPU indices."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "_unique2"}
"""Operations whose results the CPU must know before it can go on."""

waits: Counter[str] = Counter()
"""How often each place of the package waited for the device."""


class OnDevice(Tensor):
    """A tensor of the pretended device; what it holds is in ``held``."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _operate(func, args, kwargs or {})

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnDevice(inner["held"])

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = OnDevice(self.held.detach().clone())
            memo[id(self)] = (
                torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return torch.clone, (self.held.detach().clone(),)  # as one reads it with map_location="cpu"

    def __repr__(self):
        return f"{self.held}, on {NAME}"

    def __format__(self, spec):
        _wait()
        return format(self.held.detach(), spec)

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        _wait()
        return self.held.tolist()

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert a {NAME} tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy


class Generator(torch._C.Generator):
    """`torch.Generator` that also knows the pretended device."""

    def __new__(cls, device="cpu"):
        pretended = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if pretended else device)
        made.pretended = pretended
        return made


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of ``torch.pretend``."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Everything within knows the device, which is given.

    Raises:
        AttributeError: a torch without devices in Python.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.Generator = Generator
    torch.tensor, torch.as_tensor = _reading(torch.tensor), _reading(torch.as_tensor)
    with _Generators(), _Operations():
        yield torch.device(NAME, 0)


class _Operations(TorchDispatchMode):
    """Operations on or towards the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        ours = any(isinstance(leaf, OnDevice) or _is_device(leaf) for leaf in leaves)
        return _operate(func, args, kwargs) if ours else func(*args, **kwargs)


class _Generators(TorchFunctionMode):
    """Random numbers: the generator must be of the tensor's device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        place = kwargs.get("device") or next((a.device for a in args if isinstance(a, Tensor)), "cpu")
        if generator is not None and getattr(generator, "pretended", False) != _is_device(torch.device(place)):
            raise RuntimeError(f"{func.__name__}: the generator is not of the device {place}")
        return func(*args, **kwargs)


def _reading(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and `torch.as_tensor`, which make a tensor of numbers before any operation."""

    def read(*args, device=None, requires_grad=False, **options):
        made = factory(*args, **options) if device is None else factory(*args, **options).to(device)
        return made.requires_grad_() if requires_grad else made

    return read


def _operate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do on the CPU what the device is asked for."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    _check(func, args, ours, [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)])
    if ours and _waits(func, args, target):
        _wait()
    plain = [
        leaf.held if isinstance(leaf, OnDevice) else torch.device("cpu") if _is_device(leaf) else leaf
        for leaf in leaves
    ]
    new_args, new_kwargs = pytree.tree_unflatten(plain, structure)
    results, structure = pytree.tree_flatten(func(*new_args, **new_kwargs))
    stays = bool(ours) if target is None else _is_device(target)
    originals = {id(leaf.held): leaf for leaf in ours}

    def result(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if func is aten.copy_.default:
            return args[0]
        if id(value) in originals:
            return originals[id(value)]
        return OnDevice(value) if stays else value

    return pytree.tree_unflatten([result(value) for value in results], structure)


def _check(func: Any, args: tuple[Any, ...], ours: list[OnDevice], others: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    if not ours or func in CROSSING:
        return
    indices = args[1] if func in INDEXING else ()
    stray = [o for o in others if o.dim() > 0 and not any(o is index for index in indices)]
    written = func._schema.name.endswith("_") and any(args[0] is other for other in others)
    if stray or written:
        raise RuntimeError(
            f"{func}: expected all tensors on one device, found {NAME} and cpu, {[tuple(o.shape) for o in others]}"
        )


def _waits(func: Any, args: tuple[Any, ...], target: torch.device | None) -> bool:
    if func._schema.name.removeprefix("aten::") in WAITING:
        return True
    if func is aten._to_copy.default:
        return target is not None and target.type == "cpu"
    if func is aten.copy_.default:
        return not isinstance(args[0], OnDevice)
    return func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])


def _wait() -> None:
    ours = [f for f in traceback.extract_stack() if any(f.filename.startswith(f"{ROOT / name}/") for name in OURS)]
    waits[f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}" if ours else "elsewhere"] += 1


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == NAME
