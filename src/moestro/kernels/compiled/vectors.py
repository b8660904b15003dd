"""What numba has no words for: addresses, bfloat16, threads, and one vector loop over 4-bit codes.

The vectors are LLVM's own, of any length, so that every processor gets the instructions that it has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from moestro.kernels.compiled.availability import thread_functions

for _name, _address in (thread_functions() or {}).items():
    llvmlite.binding.add_symbol(_name, _address)

barrier = types.ExternalFunction("GOMP_barrier", types.void())
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
INPUTS_AT_ONCE = 32  # of `add_nibble_products`


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def from_bfloat16(typing: Any, bits: Any) -> Any:
    """The number that 16 bits of a bfloat16 stand for."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _INT), ir.Constant(_INT, 16))
        return builder.bitcast(wide, _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def to_bfloat16(typing: Any, number: Any) -> Any:
    """The nearest bfloat16 of a finite number, ties to even, as 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INT)
        last = builder.and_(builder.lshr(bits, ir.Constant(_INT, 16)), ir.Constant(_INT, 1))
        rounded = builder.add(bits, builder.add(last, ir.Constant(_INT, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(_INT, 16)), _SHORT)

    return types.uint16(types.float32), generate


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 to a whole power from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(args[0], ir.Constant(_INT, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_INT, 23)), _FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_INT, number) for number in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], cgutils.voidptr_t), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@cache
def multiplies_bytes() -> bool:
    """Whether this processor adds up products of four bytes in one instruction, and orders bytes freely."""
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:
        return False  # somebody asked for code of another processor
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512vbmi"))


class NibbleProducts:
    """What `add_nibble_products` compiles to: a loop over 32 inputs of a block of `2 * lanes` outputs of 4 bits.

        low[d]  += sum_i row[i] * (code[i, d] & 15)        high[d] += sum_i row[i] * (code[i, d] >> 4)

    in vectors of shorts, of any processor, or of bytes where `multiplies_bytes`; the sums are the same numbers.

    Shapes, by address: code `[32, lanes]` uint8, row `[32]` int8, sums `[2, lanes]` int32: low, high.
    """

    def __init__(self, lanes: int, bytewise: bool) -> None:
        self.lanes, self.bytewise = lanes, bytewise

    def __call__(self, context: Any, builder: Any, signature: Any, args: Any) -> Any:
        self.builder, (self.code, self.row, sums) = builder, args
        count = 4 if self.bytewise else 2  # vectors of sums
        kind = ir.VectorType(_INT, 2 * self.lanes // count)
        size = 4 * kind.count
        totals = [self._load(sums, size * number, kind) for number in range(count)]
        add = self._bytewise if self.bytewise else self._by_shorts
        for number, total in enumerate(add(totals)):
            builder.store(total, self._place(sums, size * number, kind)).align = 1
        return context.get_dummy_value()

    def _by_shorts(self, totals: list[Any]) -> list[Any]:
        """Codes are 0 to 15 and rows -127 to 127, so that the products of 16 inputs add up in 16 bits."""
        builder, lanes = self.builder, self.lanes
        codes, shorts, ints = (ir.VectorType(kind, lanes) for kind in (_BYTE, _SHORT, _INT))
        for start in range(0, INPUTS_AT_ONCE, 16):
            short = [_every(shorts, 0), _every(shorts, 0)]
            for i in range(start, start + 16):
                pair = self._load(self.code, lanes * i, codes)
                number = _spread(builder, builder.sext(self._load(self.row, i, _BYTE), _SHORT), lanes)
                for half, nibbles in enumerate(_halves(builder, pair)):
                    product = builder.mul(builder.zext(nibbles, shorts), number)
                    short[half] = builder.add(short[half], product)
            totals = [
                builder.add(total, builder.sext(part, ints)) for total, part in zip(totals, short, strict=True)
            ]
        return totals

    def _bytewise(self, totals: list[Any]) -> list[Any]:
        """Four inputs of an output come to lie side by side; then one instruction multiplies and adds all four."""
        builder, codes, ints = self.builder, ir.VectorType(_BYTE, 64), ir.VectorType(_INT, 16)
        kind = ir.FunctionType(ints, [ints, codes, codes])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        for i in range(0, INPUTS_AT_ONCE, 4):
            two, other = (self._load(self.code, 32 * i + offset, codes) for offset in (0, 64))
            numbers = builder.bitcast(_spread(builder, self._load(self.row, i, _INT), 16), codes)
            for part in range(2):
                outputs = range(16 * part, 16 * part + 16)
                order = [32 * number + output for output in outputs for number in range(4)]
                fours = builder.shuffle_vector(two, other, ir.Constant(ir.VectorType(_INT, 64), order))
                for half, nibbles in enumerate(_halves(builder, fours)):
                    place = 2 * half + part
                    totals[place] = builder.call(add, [totals[place], nibbles, numbers])
        return totals

    def _place(self, base: Any, offset: int, kind: ir.Type) -> Any:
        return self.builder.inttoptr(self.builder.add(base, ir.Constant(_LONG, offset)), kind.as_pointer())

    def _load(self, base: Any, offset: int, kind: ir.Type) -> Any:
        value = self.builder.load(self._place(base, offset, kind))
        value.align = 1
        return value


def _every(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _every(ir.VectorType(_INT, lanes), 0))


def _halves(builder: Any, codes: Any) -> tuple[Any, Any]:
    """The low four bits of every byte, and the high ones."""
    return builder.and_(codes, _every(codes.type, 15)), builder.lshr(codes, _every(codes.type, 4))


_BY_ADDRESS = types.void(types.int64, types.int64, types.int64)


@intrinsic
def add_nibble_products_64(typing: Any, code: Any, row: Any, sums: Any) -> Any:
    """`NibbleProducts` of a block of 64 outputs."""
    return _BY_ADDRESS, NibbleProducts(32, multiplies_bytes())


@intrinsic
def add_nibble_products_32(typing: Any, code: Any, row: Any, sums: Any) -> Any:
    """`NibbleProducts` of a block of 32 outputs."""
    return _BY_ADDRESS, NibbleProducts(16, bytewise=False)


def _unpack(lanes: int) -> Any:
    """Writes the codes of one input of a block of `2 * lanes` outputs, less 8, times their multiples.

    Shapes, by address: code `[lanes]` uint8, multiple and out `[2, lanes]` int8: low, high.
    """
    kind = ir.VectorType(_BYTE, lanes)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code, multiple, out = args

        def place(base: Any, offset: int) -> Any:
            return builder.inttoptr(builder.add(base, ir.Constant(_LONG, offset)), kind.as_pointer())

        def load(base: Any, offset: int) -> Any:
            value = builder.load(place(base, offset))
            value.align = 1
            return value

        for half, nibbles in enumerate(_halves(builder, load(code, 0))):
            number = builder.sub(nibbles, _every(kind, 8))
            product = builder.mul(number, load(multiple, half * lanes))
            builder.store(product, place(out, half * lanes)).align = 1
        return context.get_dummy_value()

    return generate


@intrinsic
def unpack_64(typing: Any, code: Any, multiple: Any, out: Any) -> Any:
    """`_unpack` of a block of 64 outputs."""
    return _BY_ADDRESS, _unpack(32)


@intrinsic
def unpack_32(typing: Any, code: Any, multiple: Any, out: Any) -> Any:
    """`_unpack` of a block of 32 outputs."""
    return _BY_ADDRESS, _unpack(16)


def widen(value: Any) -> Any:
    """What memory holds, as float32: uint16 is a bfloat16."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen, inline="always", strict=False)
def _widen(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: from_bfloat16(value)
    return lambda value: np.float32(value)


def narrow(value: Any, like: Any) -> Any:
    """A float32 in the dtype of a table."""
    raise NotImplementedError("only compiled code calls this")


@overload(narrow, inline="always", strict=False)
def _narrow(value: Any, like: Any) -> Any:
    if like.dtype == types.uint16:
        return lambda value, like: to_bfloat16(value)
    return lambda value, like: value


@numba.njit(fastmath={"contract"})  # ln 2 comes in two parts that must not be added first
def exponential(x: np.float32) -> np.float32:
    """exp(x) to 2e-7 of itself; a library's would be called for one number at a time."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    whole = np.float32(np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    rest = x - whole * np.float32(0.693359375)
    rest = rest + whole * np.float32(2.12194440e-4)
    series = rest * np.float32(1 / 5040) + np.float32(1 / 720)
    series = series * rest + np.float32(1 / 120)
    series = series * rest + np.float32(1 / 24)
    series = series * rest + np.float32(1 / 6)
    series = series * rest + np.float32(0.5)
    series = series * rest + np.float32(1.0)
    series = series * rest + np.float32(1.0)
    return series * power_of_two(np.int32(whole))
