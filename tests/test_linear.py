"""`Int4Linear` and the op: the path follows the real M, eagerly and compiled; twins are derived data."""

import copy
import shutil
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import assert_close, random_weight
from twinweight import ops, paths
from twinweight.kernels import int8
from twinweight.kernels.reference import linear as reference
from twinweight.linear import Int4Linear
from twinweight.paths import Path, Route

KINDS = [
    "float32",
    "bfloat16",
    pytest.param("int8", marks=pytest.mark.skipif(not int8.available(), reason="needs a CPU with VNNI or AMX")),
]
ROUTE = Route((0, 8), (Path.INT4, Path.TWIN))
COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
]


def make(
    *, twin: str | torch.dtype | None = torch.float32, bias: bool = True, symmetric: bool = True, act_order: bool = False
) -> Int4Linear:
    weight = random_weight(96, 128, 32, symmetric=symmetric, act_order=act_order)
    linear = Int4Linear(weight, torch.randn(96).bfloat16() if bias else None)
    linear.route_with_twin = ROUTE
    if twin is not None:
        linear.build_twin(twin)
    return linear


def addresses(linear: Int4Linear) -> list[int]:
    """Of the weight and its twin, which CUDA graphs would hold."""
    return [t.data_ptr() for t in (linear.packed, linear.twin, linear.twin_scales) if t is not None]


def taken(call: object, *args: torch.Tensor) -> set[Path]:
    paths.calls.clear()
    call(*args)  # type: ignore[operator]
    return {path for path, _ in paths.calls}


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 128).bfloat16()


@pytest.mark.parametrize(
    ("shape", "path"), [((1,), Path.INT4), ((7,), Path.INT4), ((8,), Path.TWIN), ((2, 4), Path.TWIN), ((2, 3), Path.INT4)]
)
def test_the_path_follows_the_rows(shape: tuple[int, ...], path: Path) -> None:
    linear = make()
    x = x_of(*shape)
    assert taken(linear, x) == {path}
    y = linear(x)
    assert y.shape == (*shape, 96)
    assert_close(y, reference(x.flatten(0, -2), linear.int4_weight, linear.bias).view(*shape, 96), 1e-2, 6e-3)


def test_no_rows() -> None:
    assert make()(x_of(0)).shape == (0, 96)
    assert make()(x_of(2, 0)).shape == (2, 0, 96)


def test_without_a_twin_the_other_route_is_taken() -> None:
    linear = make(twin=None)
    assert taken(linear, x_of(64)) == {Path.INT4}
    linear.build_twin(torch.bfloat16)
    assert taken(linear, x_of(64)) == {Path.TWIN}
    linear.use_twin = False
    assert taken(linear, x_of(64)) == {Path.INT4}
    linear.use_twin = True
    linear.drop_twin()
    assert taken(linear, x_of(64)) == {Path.INT4}


@pytest.mark.parametrize("kind", KINDS[::2])
@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_with_many_rows_then_called_with_one_runs_int4(backend: str, kind: str) -> None:
    linear = make(twin=kind)
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=counting)
    with torch.inference_mode():
        large = x_of(64)
        torch._dynamo.mark_dynamic(large, 0)
        assert taken(compiled, large) == {Path.TWIN}
        assert taken(compiled, x_of(2)) == {Path.INT4}
        for m in (2, 7, 8, 33, 200):
            x = x_of(m)
            assert torch.equal(compiled(x), linear(x))
            assert taken(compiled, x) == {ROUTE.at(m)}
        assert graphs == 1  # one graph serves every size
        one = x_of(1)  # torch specialises on 1 unless told otherwise: the path must be right either way
        assert taken(compiled, one) == {Path.INT4}
        assert torch.equal(compiled(one), linear(one))


def test_one_graph_for_layers_of_one_shape_takes_tensors_only() -> None:
    schema = str(torch.ops.twinweight.linear.default._schema)
    assert "str" not in schema
    assert "Tensor? twin, Tensor? twin_scales" in schema


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_passes_torchs_own_checks(kind: str) -> None:
    linear = make(symmetric=False, act_order=True, twin=kind)
    args = (
        x_of(16), linear.packed, linear.scales, linear.zeros, linear.perm, linear.bias, linear.twin, linear.twin_scales,
        ROUTE.flat(), linear.group_size, 96
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.twinweight.linear.default, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


class Watched(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_op_and_nobody_else_pays_for_it() -> None:
    linear, x = make(), x_of(4)
    plain = linear(x)
    assert ops.only_computes(x)
    with Watched() as watched:
        assert not ops.only_computes(x)
        assert torch.equal(linear(x), plain)
    assert "twinweight.linear.default" in watched.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(linear(x), plain)
    assert "twinweight::linear" in {event.key for event in profile.key_averages()}
    assert torch.equal(torch.func.vmap(linear)(x.unsqueeze(1)).squeeze(1), plain)
    traced = make_fx(linear)(x)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_function"] == ["twinweight.linear.default"]
    wants_gradient = x.clone().requires_grad_()
    assert not ops.only_computes(wants_gradient)
    with torch.no_grad():
        assert ops.only_computes(wants_gradient)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("twin", [None, "float32", *KINDS[2:]])
@pytest.mark.parametrize("path", [Path.INT4, Path.STREAM, Path.TWIN])
def test_a_size_met_before_gives_the_same(path: Path, twin: str | None, bias: bool) -> None:
    """By what was worked out then, which is counted; rows that lie otherwise are looked at, and another width is refused."""
    linear = make(twin=twin, bias=bias)
    linear.route_with_twin = linear.route_without_twin = Route.always(path)
    if path is Path.TWIN and twin is None:
        for _ in range(2):
            with pytest.raises(ValueError, match="leads to the twin"):
                linear(x_of(5))
        return
    for shape in ((5,), (1, 5), (2, 1, 3), (0,)):
        x, other = x_of(*shape), x_of(*shape)
        first = [linear(x), linear(other)]
        paths.calls.clear()
        assert all(torch.equal(linear(v), y) for v, y in zip((x, other), first, strict=True))
        assert sum(paths.calls.values()) == 2
        assert taken(linear, x) == {path}
    strided = torch.randn(128, 9).bfloat16().t()
    assert torch.equal(linear(strided), linear(strided.contiguous()))  # a size not met before
    strided = torch.randn(128, 5).bfloat16().t()
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    odd = torch.empty(5 * 128 + 1, dtype=torch.bfloat16)[1:].view(5, 128).copy_(strided)
    assert torch.equal(linear(odd), linear(strided.contiguous()))
    with pytest.raises(TypeError, match=r"activations are torch\.float16"):
        linear(x_of(5).half())


def test_a_size_met_before_follows_what_changed() -> None:
    """The route, the twin, its use, the bias, the weight."""
    linear, x = make(), x_of(16)
    linear(x)
    assert taken(linear, x) == {Path.TWIN}
    linear.use_twin = False
    assert taken(linear, x) == {Path.INT4}
    linear.route_without_twin = Route.always(Path.STREAM)
    assert taken(linear, x) == {Path.STREAM}
    linear.use_twin = True
    assert linear.twin is not None
    linear.twin *= 2
    assert linear.bias is not None
    linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)
    assert_close(linear(x), 2 * reference(x, linear.int4_weight, None), max_err=1e-2)
    linear.twin = linear.twin * 2
    assert_close(linear(x), 4 * reference(x, linear.int4_weight, None), max_err=1e-2)
    kept = weakref.ref(linear.twin)
    linear.drop_twin()
    assert kept() is None
    linear.route_without_twin = Route.always(Path.INT4)
    linear.packed = make().packed
    assert_close(linear(x), reference(x, linear.int4_weight, None), max_err=1e-2)


def test_a_trained_bias_has_a_gradient_where_activations_have_none() -> None:
    linear, x = make(), x_of(3)
    linear(x)
    assert linear.bias is not None
    linear.bias.requires_grad_()
    linear(x).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((96,), 3.0).bfloat16())


@pytest.mark.parametrize("path", [Path.INT4, Path.STREAM, Path.TWIN])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, True)])
def test_gradients_pass_through_every_path(path: Path, symmetric: bool, act_order: bool) -> None:
    """Of activations, and of a bias that is trained: soft prompts, adapters on other modules."""
    linear = make(symmetric=symmetric, act_order=act_order)
    assert linear.bias is not None
    linear.bias.requires_grad_()
    linear.route_with_twin = Route.always(path)
    x = torch.randn(2, 3, 128).bfloat16().requires_grad_()
    grad = torch.randn(2, 3, 96).bfloat16()
    linear(x).backward(grad)
    dense = linear.int4_weight.dequantize(torch.float64)
    assert x.grad is not None
    assert_close(x.grad, (grad.double() @ dense).bfloat16(), max_err=2e-2)
    assert linear.bias.grad is not None
    assert_close(linear.bias.grad, grad.double().sum((0, 1)).bfloat16(), max_err=2e-2)


@pytest.mark.parametrize("width", [96, 120, 136, 256])
@pytest.mark.parametrize("watched", [False, True])
def test_activations_of_another_width_are_refused(width: int, watched: bool) -> None:
    """Kernels pad K, and would take some."""
    with pytest.raises(ValueError, match=f"activations have {width} features, the int4 weight takes 128"):
        make()(torch.randn(2, width).bfloat16().requires_grad_(watched))


@pytest.mark.parametrize("path", [Path.INT4, Path.FUSED, Path.STREAM, Path.TWIN])
def test_activations_need_not_be_contiguous(path: Path) -> None:
    linear = make()
    linear.route_with_twin = Route.always(path)
    for x in (torch.randn(128, 5).bfloat16().t(), torch.randn(3, 256).bfloat16()[:, ::2], torch.randn(1, 128, 4).bfloat16().mT):
        assert torch.equal(linear(x), linear(x.contiguous()))


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("weight_packed", (1536,)),
        ("weight_scale", (1, 4)),
        ("weight_scale", (48, 4)),
        ("weight_zero_point", (96, 2)),
        ("weight_g_idx", (64,)),
    ],
)
def test_a_state_dict_of_other_shapes_is_refused(field: str, shape: tuple[int, ...]) -> None:
    linear = make(symmetric=False, act_order=True)
    state = linear.state_dict()
    state[field] = torch.zeros(shape, dtype=state[field].dtype)
    before = linear.int4_weight
    with pytest.raises(RuntimeError, match="expected"):
        linear.load_state_dict(state)
    assert torch.equal(linear.int4_weight.packed, before.packed)
    assert torch.equal(linear.int4_weight.scales, before.scales)


def test_a_twin_for_which_there_is_no_memory_where_the_model_moves_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linear = make()

    def full(kind: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear, "build_twin", full)
    linear.to(torch.float16)
    assert linear.twin is None
    assert "stays int4" in caplog.text
    assert linear(torch.randn(20, 128).half()).dtype == torch.float16


def test_a_weight_that_moves_away_is_freed() -> None:
    linear = make(bias=False, twin=None)
    linear(x_of(1))
    before = weakref.ref(linear.packed)
    linear.to("meta")
    assert linear.packed.is_meta
    assert before() is None


def test_a_replaced_weight_is_seen() -> None:
    linear, other, x = make(bias=False, twin=None), make(bias=False, twin=None), x_of(1)
    other.set_weight(random_weight(96, 128, 32, seed=1))
    wanted = other(x)
    assert not torch.equal(linear(x), wanted)
    swapped = {"packed": other.packed, "scales": other.scales}
    assert torch.equal(torch.func.functional_call(linear, swapped, (x,)), wanted)
    assert not torch.equal(linear(x), wanted)


def test_other_activation_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float16.*bfloat16"):
        make()(torch.randn(1, 128).half())


def test_a_route_to_a_missing_twin_is_refused() -> None:
    linear = make(twin=None)
    linear.route_without_twin = Route.always(Path.TWIN)
    with pytest.raises(ValueError, match="none"):
        linear(x_of(1))


@pytest.mark.parametrize("kind", KINDS)
def test_twins_are_in_neither_state_dict_nor_parameters(kind: str) -> None:
    linear = make(twin=kind)
    with_twin = linear.state_dict()
    linear.drop_twin()
    assert with_twin.keys() == linear.state_dict().keys() == {"weight_packed", "weight_scale", "bias"}
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, False), (False, True)])
def test_reloading_refreshes_weight_and_twin_in_place(symmetric: bool, act_order: bool, kind: str) -> None:
    linear = make(symmetric=symmetric, act_order=act_order, twin=kind)
    other = Int4Linear(random_weight(96, 128, 32, symmetric=symmetric, act_order=act_order, seed=1), torch.randn(96).bfloat16())
    assert linear.twin is not None
    before = addresses(linear)
    x = x_of(64)
    stale = linear(x)
    linear.load_state_dict(other.state_dict())
    assert addresses(linear) == before
    other.build_twin(kind)
    assert torch.equal(linear.twin, other.twin)
    other.route_with_twin = ROUTE
    assert torch.equal(linear(x), other(x))
    assert not torch.equal(linear(x), stale)


def test_a_state_dict_of_another_kind_is_refused() -> None:
    linear = make()
    wrong = Int4Linear(random_weight(96, 64, 32), torch.zeros(96).bfloat16()).state_dict()
    with pytest.raises(RuntimeError, match=r"96 x 64.*96 x 128"):
        linear.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="weight_scale"):
        linear.load_state_dict({"weight_packed": linear.state_dict()["weight_packed"], "bias": linear.bias})


@pytest.mark.parametrize("kind", KINDS)
def test_build_twice_keeps_the_address_and_another_kind_does_not(kind: str) -> None:
    linear = make(twin=kind)
    before = addresses(linear)
    linear.build_twin(kind)
    assert addresses(linear) == before
    assert linear.twin_kind == kind
    linear.build_twin(torch.float16)
    assert linear.twin_kind == "float16"
    assert linear.twin_scales is None
    assert linear.twin_bytes == 2 * 96 * 128


def test_to_another_dtype_takes_weight_and_twin_along() -> None:
    linear = make(twin=torch.bfloat16)
    model = nn.Sequential(linear).to(torch.float16)
    assert linear.scales.dtype == torch.float16
    assert linear.twin is not None
    assert linear.twin.dtype == torch.float16
    x = torch.randn(16, 128).half()
    assert_close(model(x), reference(x, linear.int4_weight, linear.bias), 1e-2, 6e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_twin_is_of_the_kind_that_fits_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make(twin=kind).to(torch.float16)
    assert linear.twin_kind == {"bfloat16": "float16"}.get(kind, kind)
    if kind == "int8":
        monkeypatch.setattr(int8, "available", lambda: False)
        assert linear.to(torch.bfloat16).twin_kind == "bfloat16"


def test_to_where_it_already_is_keeps_the_twin() -> None:
    linear = make()
    twin = linear.twin
    nn.Sequential(linear).to("cpu", torch.bfloat16)
    assert linear.twin is twin


def test_a_copy_is_independent() -> None:
    linear = make()
    clone = copy.deepcopy(linear)
    clone.drop_twin()
    assert linear.twin is not None


def test_twin_equals_identity_through_int4() -> None:
    linear = make(twin=torch.bfloat16, bias=False, symmetric=False, act_order=True)
    linear.route_with_twin = Route.always(Path.INT4)
    assert torch.equal(linear(torch.eye(128).bfloat16()).T, linear.twin)
