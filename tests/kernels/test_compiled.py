"""Compiled products: every layout, both ways through 4-bit codes, other processors' packing, no numba at all."""

import ctypes
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from moestro.experts import quantise_linear
from moestro.inference import choose_steps, lay_out_for_decoding
from moestro.inference.compiled_step import CompiledMap
from moestro.kernels.compiled import availability, why_not
from moestro.kernels.packed import pack_codes, packed_block, unpack_codes

needs_numba = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@needs_numba
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_linear_map_equals_its_weights(bits, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for inputs, outputs in ((64, 64), (96, 320), (1, 1), (100, 7), (257, 130)):
            biased = outputs < 100
            linear = nn.Linear(inputs, outputs, bias=biased)
            row = torch.randn(1, inputs)
            if bits < 16:
                linear = quantise_linear(linear, bits, group=32)[0]
                weight = linear.matrix.matrix(0).t()
            else:
                linear = linear.to(torch.bfloat16 if bits == 16 else torch.float32)
                weight = linear.weight.detach().float()
            layouts = [linear]
            if bits == 16:
                layouts.append(nn.Sequential(nn.Linear(inputs, outputs, bias=biased).bfloat16()))
                layouts[1].load_state_dict({f"0.{name}": each for name, each in linear.state_dict().items()})
                lay_out_for_decoding(layouts[1], "torch")
                layouts[1] = layouts[1][0]
                assert layouts[1].weight.t().is_contiguous()
            expected = row.double() @ weight.double().t() + (linear.bias.detach().double() if biased else 0)
            for module in layouts:
                y = CompiledMap(module)(row)
                far = float((y.double() - expected).norm() / expected.norm())
                assert far < (0.01 if bits == 4 else 1e-5), (inputs, outputs, far)
    finally:
        torch.set_num_threads(before)


@needs_numba
@pytest.mark.parametrize(("lanes", "bytewise"), [(32, False), (16, False), (32, True)])
def test_sums_of_nibbles_are_the_same_on_every_processor(lanes, bytewise):
    import numba
    from numba import types
    from numba.extending import intrinsic

    from moestro.kernels.compiled.vectors import NibbleProducts, multiplies_bytes

    if bytewise and not multiplies_bytes():
        pytest.skip("this processor does not multiply bytes")
    generate = NibbleProducts(lanes, bytewise)
    addresses = types.void(types.int64, types.int64, types.int64)

    @intrinsic
    def add(typing, code, row, sums):
        return addresses, generate

    step = numba.cfunc(addresses)(lambda code, row, sums: add(code, row, sums))
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(step.address)
    for extreme in (False, True):
        code = torch.randint(0, 256, (32, lanes), dtype=torch.uint8)
        row = torch.randint(-127, 128, (32,), dtype=torch.int8)
        if extreme:
            code.fill_(255)
            row.fill_(-127)
        sums = torch.randint(-1000, 1000, (2, lanes), dtype=torch.int32)
        halves = torch.stack([code & 15, code >> 4]).int()
        expected = sums + torch.einsum("i,hid->hd", row.int(), halves)
        call(code.data_ptr(), row.data_ptr(), sums.data_ptr())
        assert torch.equal(sums, expected)


@needs_numba
def test_reads_what_torch_packs_for_older_processors():
    code = (
        "import torch\n"
        "from moestro.experts import quantise_linear\n"
        "from moestro.inference.compiled_step import CompiledMap\n"
        "from moestro.kernels.packed import packed_block\n"
        "linear, _ = quantise_linear(torch.nn.Linear(96, 130, bias=False), 4, group=32)\n"
        "row = torch.randn(1, 96)\n"
        "y, expected = CompiledMap(linear)(row), row @ linear.matrix.matrix(0)\n"
        "print(packed_block(), float((y - expected).norm() / expected.norm()))\n"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    block, far = answer.stdout.split()
    assert float(far) < 0.01
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert block == "32"


@needs_numba
@pytest.mark.parametrize("threads", [1, 3])
def test_unpacks_to_the_integers_that_torch_finds(threads):
    from moestro.kernels.compiled.unpack import unpack_multiples

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for inputs, outputs, group in ((32, 64, 32), (256, 192, 64), (96, 128, 32)):
            code = pack_codes(torch.randint(0, 16, (outputs, inputs), dtype=torch.int32))
            multiple = torch.randint(1, 16, (inputs // group, outputs), dtype=torch.int8)
            found = unpack_multiples(code, multiple, group, packed_block() // 2)
            assert torch.equal(found, unpack_codes(code) * multiple.repeat_interleave(group, dim=0))
    finally:
        torch.set_num_threads(before)


@needs_numba
def test_kept_code_is_compared_with_all_its_sources(monkeypatch, tmp_path):
    from moestro.kernels.compiled import sources

    (tmp_path / "products.py").write_text("a = 1")
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    before = sources.sources()
    (tmp_path / "products.py").write_text("a = 2")
    assert sources.sources() != before


@needs_numba
def test_compiles_where_no_cache_can_be_written(monkeypatch):
    import numba

    from moestro.kernels.compiled import sources

    compile_it, tried = numba.cfunc, []

    def without_a_place(signature, cache=False):
        tried.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'step': no locator available for file 'x.py'")
        return compile_it(signature)

    monkeypatch.setattr(numba, "cfunc", without_a_place)

    def step(address):
        return None

    assert sources.compiled(step).address
    assert tried == [True, False]


@pytest.fixture
def _without_numba(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else found(name))
    availability.why_not.cache_clear()
    yield
    availability.why_not.cache_clear()


@pytest.mark.usefixtures("_without_numba")
def test_without_numba_torch_decodes_and_says_why():
    assert choose_steps("auto") == "torch"
    with pytest.raises(
        ValueError, match=r"no compiled steps here: numba is not installed; pip install 'moestro\[fast"
    ):
        choose_steps("compiled")


def test_threads_of_another_openmp_are_a_reason(monkeypatch):
    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba is missing first")
    monkeypatch.setattr(availability, "thread_functions", lambda: None)
    availability.why_not.cache_clear()
    try:
        assert "GNU OpenMP" in str(why_not())
    finally:
        monkeypatch.undo()
        availability.why_not.cache_clear()


def test_unknown_steps_are_refused():
    with pytest.raises(ValueError, match="steps='fast'; choose one of auto, torch, compiled"):
        choose_steps("fast")
